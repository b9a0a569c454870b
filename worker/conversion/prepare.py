"""The weights of a converted checkpoint: under the checkpoint's own names for any number of ranks, or cut for each rank.

Shape legend: N rows (outputs), K columns (inputs).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from flm.kernels.quant import QuantizedMatrix
from flm.kernels.stored import StoredMatrix
from flm.worker.checkpoints.checkpoint import Checkpoint
from flm.worker.config import Span
from flm.worker.files.safetensors_file import INDEX_NAME
from flm.worker.files.safetensors_writer import SafetensorsWriter
from flm.worker.packing.prepared import METHOD, PART_ENDINGS, write_weight
from flm.worker.tensors.precision import Precision, convert, parse_quantization

FILE_BYTES = 4 << 30  # of the source's tensors in one file
Progress = Callable[[float], None]


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the source that the decoder needs: its name, the format to write it in, its size there."""

    name: str
    format: str  # "" for a vector
    nbytes: int


def write_weights(
    checkpoint: Checkpoint, target: Path, quantization: str, on_progress: Progress
) -> dict[str, Any]:
    """Every tensor under its own name, so that the family's recipes hold as before; returns what config.json must say."""
    precision = parse_quantization(quantization)
    tensors = _tensors(checkpoint, precision)
    groups, total, done = list(_files(tensors)), sum(t.nbytes for t in tensors), 0
    columns: dict[str, int] = {}
    index: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = (
            "model.safetensors"
            if len(groups) == 1
            else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        )
        names = [tensor.name + ending for tensor in group for ending in PART_ENDINGS]
        with SafetensorsWriter(target / name, names) as writer:
            for tensor in group:
                _write(writer, checkpoint, tensor, precision, columns)
                done += tensor.nbytes
                on_progress(done / total)
            index |= dict.fromkeys(writer.tensors, name)
    if len(groups) > 1:
        content = {
            "metadata": {"total_size": sum(p.stat().st_size for p in target.glob("*.safetensors"))},
            "weight_map": index,
        }
        (target / INDEX_NAME).write_text(json.dumps(content, indent=1))
    if not any(tensor.format in ("int4", "int8", "fp8") for tensor in tensors):
        return {}
    return {"quantization_config": {"quant_method": METHOD, "columns": columns}}


def _tensors(checkpoint: Checkpoint, precision: Precision) -> list[_Tensor]:
    """Every tensor of the source that some canonical tensor is made of, in the order of the decoder."""
    found: dict[str, _Tensor] = {}
    for name, shape in checkpoint.shapes.items():
        source = checkpoint.recipes[name].tensor
        storage = checkpoint.source.storage(source)
        format = precision.wanted(name, storage.format) if len(shape) == 2 else ""
        if len(shape) == 2 and not source.endswith(".weight"):
            format = storage.format  # quantised parts are found by that ending
        found.setdefault(source, _Tensor(source, format, storage.nbytes))
    return list(found.values())


def _files(tensors: list[_Tensor]) -> Iterator[list[_Tensor]]:
    group: list[_Tensor] = []
    for tensor in tensors:
        if group and sum(t.nbytes for t in group) + tensor.nbytes > FILE_BYTES:
            yield group
            group = []
        group.append(tensor)
    yield group


def _write(
    writer: SafetensorsWriter,
    checkpoint: Checkpoint,
    tensor: _Tensor,
    precision: Precision,
    columns: dict[str, int],
) -> None:
    shape = checkpoint.source.shape(tensor.name)
    if not tensor.format:
        writer.add(
            tensor.name, "F32", checkpoint.source.vector(tensor.name, Span(0, prod(shape))).reshape(shape)
        )
        return
    matrix = stored_matrix(checkpoint, tensor, precision.group_for(shape[1]))
    width = write_weight(writer, tensor.name, matrix)
    if width is not None:
        columns[tensor.name] = width


def stored_matrix(checkpoint: Checkpoint, tensor: _Tensor, group: int) -> StoredMatrix:
    """A whole matrix of the source in the tensor's format."""
    n, k = checkpoint.source.shape(tensor.name)
    checkpoint.source.will_read(tensor.name, Span(0, n), Span(0, k))

    def read(start: int, stop: int) -> QuantizedMatrix:
        return convert(
            checkpoint.source.matrix(tensor.name, Span(start, stop), Span(0, k)), tensor.format, group
        )

    by_rows = checkpoint.source.storage(tensor.name).by_rows
    return StoredMatrix((n, k), read) if by_rows else StoredMatrix.of(read(0, n))
