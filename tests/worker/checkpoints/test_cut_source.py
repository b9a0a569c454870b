"""shards.json of a checkpoint that was cut for a number of ranks: whatever it says is read or refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flm.worker.checkpoints.checkpoint import open_checkpoint
from flm.worker.conversion.convert import convert
from flm.worker.errors import CheckpointError

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def damaged(said: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in said:
        if name != "expert_parallel":
            yield from (said | {name: value} for value in (None, 0, -1, 1, "x", [], {}, [[]], {"a": [1]}))
    norms, rows = said["pieces"][NORM], said["pieces"][EMBEDDING]
    for boxes in (
        [None, None],
        norms[:1],
        [*norms, *norms],
        ["ab", "ab"],
        [[0], [0]],
        [[0, 1.5], [0, 1]],
        [[0, 1]] * 2,
    ):
        yield said | {"pieces": said["pieces"] | {NORM: boxes}}
    yield said | {"pieces": said["pieces"] | {EMBEDDING: [norms[0], rows[1]]}}


def test_a_damaged_list_of_pieces_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "cut"
    convert(GOLDEN / "llama2", target, "auto", 2, lambda fraction: None)
    path = target / "shards.json"
    said = json.loads(path.read_text())
    assert open_checkpoint(target).cut is not None
    for content in (content for content in damaged(said) if content != said):
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=str(target)):
            open_checkpoint(target)
