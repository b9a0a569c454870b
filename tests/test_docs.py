"""The documents name every key and every command there is, and the files they link to exist."""

from __future__ import annotations

import ast
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from flm.cluster.cli import app
from flm.cluster.settings.config import ClusterConfig, ModelSection, parse_config
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


def blocks(kind: str) -> list[tuple[str, str]]:
    """Page and text of every block of this kind."""
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    found = [
        (page.name, re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
        for page in pages
    ]
    return [(name, text) for name, texts in found for text in texts]


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_printed_yaml_is_what_the_configuration_takes(page: str, text: str) -> None:
    more = ("" if "name: demo" in text else "name: x\n") + (
        "" if "models:" in text else "models: [{name: m, path: p}]\n"
    )
    assert parse_config(more + text, page).models


@pytest.mark.parametrize(("page", "text"), blocks("console"))
def test_printed_commands_are_what_the_cli_takes(page: str, text: str) -> None:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    for line in re.findall(r"^\$ flm-cluster (.*)$", text, re.MULTILINE):
        name, *arguments = shlex.split(line, comments=True)
        with group.commands[name].make_context(name, arguments):
            pass  # wrong usage raises


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_printed_python_uses_what_there_is(page: str, text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            module = import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
