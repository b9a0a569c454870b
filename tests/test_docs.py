"""The documents name every key and every command there is, and the files they link to exist."""

from __future__ import annotations

import re
from pathlib import Path

from flm.cluster.cli import app
from flm.cluster.settings.config import ClusterConfig, ModelSection
from flm.cluster.settings.hardware import KNOWN_GPUS, NodeSpec

ROOT = Path(__file__).resolve().parent.parent


def test_every_configuration_key_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    fields = {**ModelSection.model_fields, **NodeSpec.model_fields, **ClusterConfig.model_fields}
    for section in (ClusterConfig.model_fields, ModelSection.model_fields):
        for name, field in section.items():
            inner = getattr(field.annotation, "model_fields", {}) if name != "replicas" else {}
            fields |= {f"{name}.{key}": None for key in inner}
    missing = [
        name
        for name in fields
        if f"`{name}`" not in text and f"{name}." not in text and f"## {name}" not in text
    ]
    assert not missing
    assert all(kind in text for kind in KNOWN_GPUS)


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    names = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]
    assert names
    assert [name for name in names if f"`{name}" not in text] == []


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == [], page
