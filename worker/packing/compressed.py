"""compressed-tensors checkpoints (llm-compressor): weights of 4 or 8 bits as integers, whatever is said of activations.

pack-quantized: weight_packed int32 [N, K * bits / 32] along K, weight_shape [2]; weight_zero_point int32
[N * bits / 32, G] along N. int-quantized: weight int8 [N, K], weight_zero_point int8 [N, G]. Both: weight_scale [N, G],
[N, 1] or [1], and weight_g_idx [K], the group of each input. Packed codes and zeros are stored with 2^(bits - 1) added.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flm.kernels.packings import NARROWEST_GROUP, Array, Codes, affine, ordered, unit_of, unpack_words
from flm.kernels.quant import QuantizedMatrix
from flm.worker.config import Span
from flm.worker.packing.module import Module
from flm.worker.tensors.tensor_source import Storage


@dataclass(frozen=True)
class CompressedTensors:
    """Shapes say how many bits and how long groups are, for they may differ from layer to layer; `group_sizes` are those
    that the config speaks of, for layers whose last group is shorter; so are `bits`, for plans without weights, 0 for none."""

    group_sizes: tuple[int, ...] = ()
    parts: tuple[str, ...] = (
        "weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "input_scale",
        "input_zero_point", "output_scale",
    )  # fmt: skip
    bits: int = 0

    def packs(self, module: Module) -> bool:
        return module.has("weight_packed") or (
            module.has("weight_scale") and module.entry("weight").dtype == "I8"
        )

    def shape(self, module: Module) -> tuple[int, int]:
        if not module.has("weight_packed"):
            n, k = module.shape("weight")
            module.check("weight", "I8", (n, k))
            return n, k
        if module.shape("weight_shape", 1) != (2,):
            raise module.fail("weight_shape", f"[2] expected, found {list(module.shape('weight_shape', 1))}")
        n, k = (int(length) for length in module.read("weight_shape"))
        words = module.shape("weight_packed")[1]
        if words not in (-(-k // 8), -(-k // 4)):
            raise module.fail(
                "weight_packed", f"{k} codes of 4 or 8 bits in words of 32 expected, found {words} words"
            )
        module.check("weight_packed", "I32", (n, words))
        return n, k

    def storage(self, module: Module) -> Storage:
        n, k = self.shape(module)
        bits, group = self._bits(module, k), self._group(module, k)
        self._check_groups(module, n, k, bits, group)
        unit = unit_of(group, k)
        cut = unit if self._order(module, k, group) is None else NARROWEST_GROUP
        label, size = f"compressed-tensors int{bits}", module.nbytes(self.parts)
        return Storage.of_groups(label, f"int{bits}", cut, size, scale_bits=64 / unit)

    def matrix(self, module: Module, rows: Span, cols: Span) -> QuantizedMatrix:
        _, k = self.shape(module)
        bits, group = self._bits(module, k), self._group(module, k)
        codes, order = self._codes(module, bits, rows, cols), self._order(module, k, group)
        if order is not None:
            scales, zeros = self._scales(module, rows, None), self._zeros(module, bits, rows, None)
            return ordered(codes, bits, scales, zeros, order[cols.start : cols.stop])
        groups = Span(cols.start // group, -(-cols.stop // group))
        scales, zeros = self._scales(module, rows, groups), self._zeros(module, bits, rows, groups)
        return affine(codes, bits, scales, zeros, group, cols.start - groups.start * group)

    def _check_groups(self, module: Module, n: int, k: int, bits: int, group: int) -> None:
        """That scales, zeros and the order belong to a weight [n, k] in such groups."""
        groups, words = -(-k // group), -(-n * bits // 32)
        one: list[tuple[int, ...]] = [(), (1,), (1, 1)]
        each: list[tuple[int, ...]] = [(n, groups), (n,)] if groups == 1 else [(n, groups)]
        found = module.entry("weight_scale").shape
        if found not in one + each:
            raise module.fail("weight_scale", f"{[n, groups]} or [1] expected, found {list(found)}")
        if module.has("weight_zero_point"):
            packed = module.entry("weight_zero_point").dtype == "I32"
            found = module.entry("weight_zero_point").shape
            if found not in ([(words, groups)] if packed else [*one, *each, (1, groups)]):
                wanted = [words if packed else n, groups]
                raise module.fail("weight_zero_point", f"{wanted} expected, found {list(found)}")
        order = self._order(module, k, group)
        if order is not None and order.max() >= groups:
            raise module.fail("weight_g_idx", f"groups below {groups} expected, found {order.max()}")

    def _bits(self, module: Module, k: int) -> int:
        return 4 if module.has("weight_packed") and module.shape("weight_packed")[1] == -(-k // 8) else 8

    def _group(self, module: Module, k: int) -> int:
        shape = module.entry("weight_scale").shape
        groups = shape[1] if len(shape) == 2 else 1
        fitting = [size for size in self.group_sizes if -(-k // size) == groups]
        if not fitting and (groups == 0 or k % groups):
            raise module.fail(
                "weight_scale", f"scales for groups of {k} inputs expected, found shape {list(shape)}"
            )
        return fitting[0] if fitting else k // groups

    def _codes(self, module: Module, bits: int, rows: Span, cols: Span) -> Codes:
        if not module.has("weight_packed"):
            return module.read("weight", rows, cols).view(np.uint8) ^ np.uint8(128)
        per = 32 // bits
        words = Span(cols.start // per, -(-cols.stop // per))
        codes = unpack_words(module.read("weight_packed", rows, words), bits)
        return codes[:, cols.start - words.start * per :][:, : cols.size]

    def _scales(self, module: Module, rows: Span, groups: Span | None) -> Array:
        """[N, G] of those rows and groups."""
        if module.entry("weight_scale").shape in ((), (1,), (1, 1)):
            return np.broadcast_to(module.scales("weight_scale").reshape(1, 1), (rows.size, 1))
        if len(module.entry("weight_scale").shape) == 1:
            return module.scales("weight_scale", rows)[:, None]
        return module.scales("weight_scale", rows, groups)

    def _zeros(self, module: Module, bits: int, rows: Span, groups: Span | None) -> NDArray[np.int16] | None:
        if not module.has("weight_zero_point"):
            return None
        middle = np.int16(1 << (bits - 1))
        if module.entry("weight_zero_point").dtype != "I32":
            stored = module.read("weight_zero_point").reshape(-1, self._groups_of(module))
            stored = (
                stored[rows.start : rows.stop] if len(stored) > 1 else np.repeat(stored, rows.size, axis=0)
            )
            stored = stored if groups is None else stored[:, groups.start : groups.stop]
            return stored.astype(np.int16) + middle
        per = 32 // bits
        words = Span(rows.start // per, -(-rows.stop // per))
        packed = np.ascontiguousarray(module.read("weight_zero_point", words, groups).T)
        first = rows.start - words.start * per
        return unpack_words(packed, bits)[:, first : first + rows.size].T.astype(np.int16)

    def _groups_of(self, module: Module) -> int:
        shape = module.entry("weight_zero_point").shape
        return shape[1] if len(shape) == 2 else 1

    def _order(self, module: Module, k: int, group: int) -> NDArray[np.int64] | None:
        """weight_g_idx, where groups are not simply one after the other; -1 in it means that they are."""
        if not module.has("weight_g_idx"):
            return None
        if module.shape("weight_g_idx", 1) != (k,):
            raise module.fail(
                "weight_g_idx", f"{[k]} expected, found {list(module.shape('weight_g_idx', 1))}"
            )
        group_of = module.read("weight_g_idx").astype(np.int64)
        if group_of.min() < 0 or np.array_equal(group_of, np.arange(k) // group):
            return None
        return group_of
