"""The table of supported models says what is so, and docs/models.md is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flm.cluster.cli.models import to_markdown
from flm.worker.errors import CheckpointError
from flm.worker.families.registry import FAMILIES, read_config
from flm.worker.families.support import SUPPORT, VERIFIED
from flm.worker.files.paths import resolve_model_path

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "data" / "golden"
SERVED = {name for family in FAMILIES for name in family.architectures}


def test_every_row_is_served_or_refused_and_every_architecture_has_one() -> None:
    for row in SUPPORT:
        assert row.verified in VERIFIED
        assert (row.architecture in SERVED) == (row.verified != "refused"), row
        assert bool(row.golden) == (row.verified == "golden logits"), row
    spelled_twice = {"LLaMAForCausalLM"}
    assert {row.architecture for row in SUPPORT if row.verified != "refused"} == SERVED - spelled_twice


def test_golden_checkpoints_are_of_the_formulas_they_stand_for() -> None:
    named = {name for row in SUPPORT for name in row.golden}
    assert named <= {path.name for path in GOLDEN.iterdir()}


def test_the_document_is_fresh() -> None:
    assert (ROOT / "docs" / "models.md").read_text() == to_markdown(), "flm-cluster models --markdown"


def test_refused_models_say_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GLMModel"]}))
    with pytest.raises(CheckpointError, match="'GLMModel' is not supported: an infilling model"):
        read_config(tmp_path)
    shards = tmp_path / "glm" / "49300"
    shards.mkdir(parents=True)
    (shards / "mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="there are no safetensors to load"):
        resolve_model_path(str(tmp_path / "glm"))
