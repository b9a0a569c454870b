"""Checkpoints cut for a number of ranks: writing each rank's weights as its decoder asks for them, and finding them again.

rank-RRRRR-of-NNNNN.safetensors holds what rank R of N reads, under canonical names and in the precision it runs in;
shards.json says which rows and columns of each tensor these are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.quant import QuantizedMatrix
from flm.kernels.reference import ReferenceBackend
from flm.kernels.stored import StoredMatrix
from flm.worker.checkpoints.checkpoint import Checkpoint
from flm.worker.checkpoints.cut_source import SHARDS_NAME, box_of, rank_file
from flm.worker.checkpoints.weights import ModelWeights, shard_spec
from flm.worker.communication.comm import LocalCommunicator
from flm.worker.config import ShardSpec, Span
from flm.worker.execution.model import Decoder
from flm.worker.files.safetensors_writer import SafetensorsWriter
from flm.worker.packing.prepared import PART_ENDINGS, write_weight
from flm.worker.tensors.precision import parse_quantization

Progress = Callable[[float], None]
Vector = NDArray[np.float32]


class _Hollow(ReferenceBackend):
    """A backend that keeps nothing: a decoder made on it asks for each of its weights once."""

    def empty(self, shape: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
        return np.empty(0, dtype)

    def pack_experts(self, experts: Iterable[Any], first: int = 0) -> Any:
        for _ in experts:
            pass

    def pack_heads(self, *arguments: Any) -> Any:
        return None


class _Recorded(ModelWeights):
    """Weights that are written on their way to a decoder; of a tensor that is asked for twice, the first time."""

    def __init__(self, weights: ModelWeights, writer: SafetensorsWriter) -> None:
        vars(self).update(vars(weights))
        self._writer = writer
        self.boxes: dict[str, tuple[int, ...]] = {}
        self.columns: dict[str, int] = {}

    def stored(self, name: str, rows: Span | None = None, cols: Span | None = None) -> StoredMatrix:
        return self._written(name, super().stored(name, rows, cols), rows, cols)

    def matrix(self, name: str, rows: Span | None = None, cols: Span | None = None) -> QuantizedMatrix:
        matrix = super().matrix(name, rows, cols)
        self._written(name, StoredMatrix.of(matrix), rows, cols)
        return matrix

    def _written(self, name: str, matrix: StoredMatrix, rows: Span | None, cols: Span | None) -> StoredMatrix:
        n, k = self._checkpoint.shape(name)
        if self._is_new(name, rows or Span(0, n), cols or Span(0, k)):
            width = write_weight(self._writer, name, matrix)
            if width is not None:
                self.columns[name] = width
        return matrix

    def vector(self, name: str, span: Span | None = None) -> Vector:
        values = super().vector(name, span)
        if self._is_new(name, span or Span(0, self._checkpoint.shape(name)[0])):
            self._writer.add(name, "F32", values)
        return values

    def _is_new(self, name: str, *spans: Span) -> bool:
        box = box_of(*spans)
        assert self.boxes.get(name, box) == box, f"{name} is read in two ways"
        if name in self.boxes:
            return False
        self.boxes[name] = box
        return True


def write_shards(
    checkpoint: Checkpoint,
    target: Path,
    quantization: str,
    ranks: int,
    expert_parallel: bool,
    on_progress: Progress,
) -> dict[str, Any]:
    """One file for each rank, and shards.json; returns what config.json must say. Raises ConfigError as shard_spec."""
    specs = [shard_spec(checkpoint, ranks, rank, quantization, expert_parallel) for rank in range(ranks)]
    written: list[_Recorded] = []
    for rank, spec in enumerate(specs):
        part = partial(_report, on_progress, rank, ranks)
        written.append(_write_rank(checkpoint, spec, target, quantization, part))
    content = {
        "ranks": ranks,
        "group": specs[0].group,
        "expert_parallel": expert_parallel,
        "columns": [weights.columns for weights in written],
        "pieces": {name: [weights.boxes.get(name) for weights in written] for name in checkpoint.shapes},
    }
    (target / SHARDS_NAME).write_text(json.dumps(content))
    return {}


def _report(on_progress: Progress, rank: int, ranks: int, fraction: float) -> None:
    on_progress((rank + fraction) / ranks)


def _write_rank(
    checkpoint: Checkpoint, spec: ShardSpec, target: Path, quantization: str, on_progress: Progress
) -> _Recorded:
    names = [name + ending for name in checkpoint.shapes for ending in PART_ENDINGS]
    plain = ModelWeights(checkpoint, spec, parse_quantization(quantization), on_progress)
    with SafetensorsWriter(target / rank_file(spec.tp_rank, spec.tp_size), names) as writer:
        weights = _Recorded(plain, writer)
        nothing: Any = [None] * spec.model.layers
        Decoder(weights, _Hollow(), LocalCommunicator(), nothing, 1, 1, 1, pack=lambda matrix: None)  # type: ignore[arg-type, return-value]
    return weights
