"""AWQ checkpoints (arXiv:2306.00978) in AutoAWQ's gemm form: 4 bits.

qweight int32 [K, N / 8] and qzeros int32 [G, N / 8], both packed along N in AWQ's order, scales [G, N].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from flm.kernels.packings import Codes, affine, unit_of, unpack_awq
from flm.kernels.quant import QuantizedMatrix
from flm.worker.config import Span
from flm.worker.packing.module import Module
from flm.worker.tensors.tensor_source import Storage

PER_WORD = 8


@dataclass(frozen=True)
class AWQ:
    """group: inputs per group, -1 for all of them."""

    group: int
    parts: tuple[str, ...] = ("qweight", "qzeros", "scales")

    def packs(self, module: Module) -> bool:
        return module.has("qweight")

    def shape(self, module: Module) -> tuple[int, int]:
        k, words = module.shape("qweight")
        groups = 1 if self.group < 0 else -(-k // self.group)
        module.check("qweight", "I32", (k, words))
        module.check("qzeros", "I32", (groups, words))
        if module.shape("scales") != (groups, words * PER_WORD):
            found = list(module.shape("scales"))
            raise module.fail("scales", f"{[groups, words * PER_WORD]} expected, found {found}")
        return words * PER_WORD, k

    def storage(self, module: Module) -> Storage:
        _, k = self.shape(module)
        unit = unit_of(self.group, k)
        storage = Storage.of_groups("AWQ int4", "int4", unit, module.nbytes(self.parts), 64 / unit)
        return replace(storage, by_rows=False)

    def matrix(self, module: Module, rows: Span, cols: Span) -> QuantizedMatrix:
        whole = module.shape("qweight")[0] if self.group < 0 else self.group
        groups = Span(cols.start // whole, -(-cols.stop // whole))
        codes = self._unpacked(module, "qweight", cols, rows)
        zeros = self._unpacked(module, "qzeros", groups, rows).astype(np.int16)
        scales = module.scales("scales", groups, rows).T
        return affine(codes, 4, scales, zeros, whole, cols.start - groups.start * whole)

    def _unpacked(self, module: Module, part: str, inputs: Span, rows: Span) -> Codes:
        """[N, inputs] of a part packed along N."""
        words = Span(rows.start // PER_WORD, -(-rows.stop // PER_WORD))
        codes = unpack_awq(np.ascontiguousarray(module.read(part, inputs, words)))
        first = rows.start - words.start * PER_WORD
        return np.ascontiguousarray(codes[:, first : first + rows.size].T)
