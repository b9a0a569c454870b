"""GPTQ checkpoints (arXiv:2210.17323) as AutoGPTQ and GPTQModel write them.

qweight int32 [K * bits / 32, N] packed along K, qzeros int32 [G, N * bits / 32] packed along N, scales [G, N], and g_idx
[K], the group of each input, which `desc_act` puts out of order. Format v1 stores zero - 1, v2 the zero itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flm.kernels.packings import NARROWEST_GROUP, affine, ordered, unit_of, unpack_words
from flm.kernels.quant import QuantizedMatrix
from flm.worker.config import Span
from flm.worker.packing.module import Module
from flm.worker.tensors.tensor_source import Storage


@dataclass(frozen=True)
class GPTQ:
    """bits: 4 or 8. group: inputs per group, -1 for all of them. zero_shift: what is added to stored zeros."""

    bits: int
    group: int
    zero_shift: int
    parts: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

    def packs(self, module: Module) -> bool:
        return module.has("qweight")

    def shape(self, module: Module) -> tuple[int, int]:
        words, n = module.shape("qweight")
        k = module.shape("g_idx", 1)[0] if module.has("g_idx") else words * 32 // self.bits
        per, groups = 32 // self.bits, 1 if self.group < 0 else -(-k // self.group)
        module.check("qweight", "I32", (-(-k // per), n))
        module.check("qzeros", "I32", (groups, -(-n // per)))
        if module.shape("scales") != (groups, n):
            raise module.fail("scales", f"{[groups, n]} expected, found {list(module.shape('scales'))}")
        return n, k

    def storage(self, module: Module) -> Storage:
        _, k = self.shape(module)
        unit = unit_of(self.group, k)
        group = unit if self._order(module, k) is None else NARROWEST_GROUP
        label, format, size = f"GPTQ int{self.bits}", f"int{self.bits}", module.nbytes(self.parts)
        storage = Storage.of_groups(label, format, group, size, scale_bits=64 / unit)
        return replace(storage, by_rows=False)

    def matrix(self, module: Module, rows: Span, cols: Span) -> QuantizedMatrix:
        _, k = self.shape(module)
        per, order = 32 // self.bits, self._order(module, k)
        words = Span(cols.start // per, -(-cols.stop // per))
        codes = unpack_words(np.ascontiguousarray(module.read("qweight", words, rows).T), self.bits)
        codes = codes[:, cols.start - words.start * per :][:, : cols.size]
        whole = k if self.group < 0 else self.group
        if order is not None:
            zeros, scales = self._zeros(module, rows, None), module.scales("scales", None, rows).T
            return ordered(codes, self.bits, scales, zeros, order[cols.start : cols.stop])
        groups = Span(cols.start // whole, -(-cols.stop // whole))
        scales, zeros = module.scales("scales", groups, rows).T, self._zeros(module, rows, groups)
        return affine(codes, self.bits, scales, zeros, whole, cols.start - groups.start * whole)

    def _zeros(self, module: Module, rows: Span, groups: Span | None) -> NDArray[np.int16]:
        """Zeros [N, G] of those rows and groups."""
        per = 32 // self.bits
        words = Span(rows.start // per, -(-rows.stop // per))
        stored = unpack_words(np.ascontiguousarray(module.read("qzeros", groups, words)), self.bits)
        first = rows.start - words.start * per
        return stored[:, first : first + rows.size].T.astype(np.int16) + np.int16(self.zero_shift)

    def _order(self, module: Module, k: int) -> NDArray[np.int64] | None:
        """g_idx, where groups are not simply one after the other."""
        if not module.has("g_idx"):
            return None
        group_of = module.read("g_idx").astype(np.int64)
        plain = np.zeros(k, np.int64) if self.group < 0 else np.arange(k) // self.group
        if np.array_equal(group_of, plain):
            return None
        if group_of.min() < 0 or group_of.max() > plain[-1]:
            raise module.fail(
                "g_idx", f"groups 0 to {plain[-1]} expected, found {group_of.min()} to {group_of.max()}"
            )
        return group_of
