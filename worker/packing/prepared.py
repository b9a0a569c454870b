"""Checkpoints that `flm-cluster convert` wrote: weights as QuantizedMatrix keeps them, so that loading is reading.

weight [N, bytes of a row's codes]: U8 int4, I8 int8, F8_E4M3 fp8. weight_scale and, where there are any, weight_offset
[N, G], float16 or float32; weight_gather int32 [columns]. What their shapes cannot say stands in config.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.quant import QuantizedMatrix, concat_rows
from flm.kernels.stored import StoredMatrix, without_codes
from flm.worker.config import Span
from flm.worker.files.safetensors_writer import SafetensorsWriter
from flm.worker.packing.module import Module
from flm.worker.tensors.tensor_source import Storage

METHOD = "flm"
PART_ENDINGS = ("", "_scale", "_offset", "_gather")  # of a weight's tensors, after its name
ROWS = 64  # pieces that are written begin at multiples of these
FORMATS = {"U8": "int4", "I8": "int8", "F8_E4M3": "fp8"}
DTYPES = {
    "int4": "U8",
    "int8": "I8",
    "fp8": "F8_E4M3",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
}
_SCALE_DTYPES = {np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}


@dataclass(frozen=True)
class Prepared:
    """columns: K of the weights whose rows are padded or gathered, by name."""

    columns: dict[str, int] = field(default_factory=dict)
    parts: tuple[str, ...] = tuple("weight" + ending for ending in PART_ENDINGS)

    def packs(self, module: Module) -> bool:
        return module.has("weight_scale")

    def shape(self, module: Module) -> tuple[int, int]:
        n, codes, groups = module.shape("weight")[0], self._codes(module), module.shape("weight_scale")[1]
        if module.shape("weight_scale") != (n, groups) or groups == 0 or codes % groups:
            found = list(module.shape("weight_scale"))
            raise module.fail("weight_scale", f"{n} rows of scales for {codes} codes expected, found {found}")
        if module.has("weight_offset"):
            module.check("weight_offset", module.entry("weight_scale").dtype, (n, groups))
        if module.has("weight_gather"):
            module.check("weight_gather", "I32", (codes,))
        return n, self.columns.get(module.stem + "weight", codes)

    def storage(self, module: Module) -> Storage:
        self.shape(module)
        format, group = FORMATS[module.entry("weight").dtype], self._group(module)
        cut = 16 if module.has("weight_gather") else group
        scales = (
            module.nbytes(("weight_scale", "weight_offset"))
            * 8
            / module.shape("weight")[0]
            / self._codes(module)
        )
        return Storage.of_groups(f"{format} group {group}", format, cut, module.nbytes(self.parts), scales)

    def matrix(self, module: Module, rows: Span, cols: Span) -> QuantizedMatrix:
        _, k = self.shape(module)
        format, group = FORMATS[module.entry("weight").dtype], self._group(module)
        gather: NDArray[np.int32] | None = (
            module.read("weight_gather") if module.has("weight_gather") else None
        )
        groups = None if gather is not None else Span(cols.start // group, -(-cols.stop // group))
        per = group // 2 if format == "int4" else group
        codes = module.read("weight", rows, None if groups is None else groups.scaled(per))
        offsets = module.scales("weight_offset", rows, groups) if module.has("weight_offset") else None
        scales = module.scales("weight_scale", rows, groups)
        width = cols.size if gather is None else k
        matrix = QuantizedMatrix(format, (rows.size, width), codes, group, scales, offsets, gather)
        return matrix if gather is None else matrix.slice_cols(cols.start, cols.stop)

    def _codes(self, module: Module) -> int:
        """Codes of a row."""
        kind, width = module.entry("weight").dtype, module.shape("weight")[1]
        if kind not in FORMATS:
            raise module.fail("weight", f"one of {', '.join(FORMATS)} expected, found {kind}")
        return width * 2 if FORMATS[kind] == "int4" else width

    def _group(self, module: Module) -> int:
        return self._codes(module) // module.shape("weight_scale")[1]


def write_weight(writer: SafetensorsWriter, name: str, matrix: StoredMatrix) -> int | None:
    """Write the weight with this name, a few rows at a time; K where `columns` must say it."""
    kept: list[QuantizedMatrix] = []
    pieces = matrix.pieces(ROWS, lambda first, rows: rows)
    first = next(pieces)

    def codes() -> Iterator[NDArray[Any]]:
        for piece in chain([first], pieces):
            kept.append(without_codes(piece))
            yield piece.codes

    writer.add_rows(name, DTYPES[first.format], codes())
    if first.scales is None:
        return None
    rest = kept[0] if len(kept) == 1 else concat_rows(kept)
    for ending, values in (("_scale", rest.scales), ("_offset", rest.offsets)):
        if values is not None:
            writer.add(name + ending, _SCALE_DTYPES[values.dtype], values)
    if rest.gather is not None:
        writer.add(name + "_gather", "I32", rest.gather)
    width = first.codes.shape[1] * (2 if first.format == "int4" else 1)
    return None if width == matrix.shape[1] and rest.gather is None else matrix.shape[1]
