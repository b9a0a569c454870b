"""Weights in float8 e4m3 with float scales: in blocks of 128 x 128 (DeepSeek-V3, Qwen3-FP8), per row, or for all of it.

weight F8_E4M3 [N, K], weight_scale_inv [N / 128, K / 128], or weight_scale of [N, 1], [N], [1] or no dimension. Both
multiply, despite the name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flm.kernels.packings import FP8_BLOCK, fp8
from flm.kernels.quant import QuantizedMatrix
from flm.worker.config import Span
from flm.worker.packing.module import Module
from flm.worker.tensors.tensor_source import Storage


@dataclass(frozen=True)
class FP8:
    """The scales' shapes say how many weights share one."""

    parts: tuple[str, ...] = ("weight", "weight_scale_inv", "weight_scale", "input_scale", "output_scale")

    def packs(self, module: Module) -> bool:
        return self._part(module) is not None and module.has("weight")

    def shape(self, module: Module) -> tuple[int, int]:
        n, k = module.shape("weight")
        module.check("weight", "F8_E4M3", (n, k))
        part = self._part(module)
        assert part is not None
        blocks, found = (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK)), module.entry(part).shape
        if found not in (blocks, (n, 1), (n,), (1,), (1, 1), ()):
            raise module.fail(
                part, f"{list(blocks)} (blocks of 128 x 128), [{n}, 1] or [1] expected, found {list(found)}"
            )
        return n, k

    def storage(self, module: Module) -> Storage:
        self.shape(module)
        return Storage.of_groups("FP8", "fp8", FP8_BLOCK, module.nbytes(self.parts), 32 / FP8_BLOCK)

    def matrix(self, module: Module, rows: Span, cols: Span) -> QuantizedMatrix:
        n, k = self.shape(module)
        part = self._part(module)
        assert part is not None
        groups = Span(cols.start // FP8_BLOCK, -(-cols.stop // FP8_BLOCK))
        scales = module.scales(part).astype(np.float32)
        if scales.shape == (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK)):
            scales = scales[np.arange(rows.start, rows.stop) // FP8_BLOCK, groups.start : groups.stop]
        else:
            scales = scales.reshape(-1, 1)
            scales = scales[rows.start : rows.stop] if len(scales) == n else scales
            scales = np.broadcast_to(scales, (rows.size, groups.size))
        return fp8(module.read("weight", rows, cols), scales)

    def _part(self, module: Module) -> str | None:
        """The tensor that holds the scales."""
        return next((part for part in ("weight_scale_inv", "weight_scale") if module.has(part)), None)
