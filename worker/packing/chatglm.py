"""ChatGLM's own int4 and int8 checkpoints: one scale per row.

weight int8 [N, K * bits / 8], weight_scale [N]. Of two 4-bit codes the high nibble is the even column; both are signed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flm.kernels.packings import affine, unit_of
from flm.kernels.quant import QuantizedMatrix
from flm.worker.config import Span
from flm.worker.packing.module import Module
from flm.worker.tensors.tensor_source import Storage


@dataclass(frozen=True)
class ChatGLM:
    """bits: 4 or 8, config.json's quantization_bit."""

    bits: int
    parts: tuple[str, ...] = ("weight", "weight_scale")

    def packs(self, module: Module) -> bool:
        return module.has("weight_scale")

    def shape(self, module: Module) -> tuple[int, int]:
        n, in_bytes = module.shape("weight")
        module.check("weight", "I8", (n, in_bytes))
        if module.shape("weight_scale", 1) != (n,):
            raise module.fail(
                "weight_scale", f"[{n}] expected, found {list(module.shape('weight_scale', 1))}"
            )
        return n, in_bytes * 8 // self.bits

    def storage(self, module: Module) -> Storage:
        _, k = self.shape(module)
        unit, label, format = unit_of(-1, k), f"ChatGLM int{self.bits}", f"int{self.bits}"
        return Storage.of_groups(label, format, unit, module.nbytes(self.parts), scale_bits=32 / unit)

    def matrix(self, module: Module, rows: Span, cols: Span) -> QuantizedMatrix:
        scales = module.scales("weight_scale", rows)[:, None]
        if self.bits == 8:
            codes = module.read("weight", rows, cols).view(np.uint8) ^ np.uint8(128)
            return affine(codes, 8, scales, None, -1)
        around = Span(cols.start // 2, -(-cols.stop // 2))
        pairs = module.read("weight", rows, around).view(np.uint8)
        codes = np.stack([pairs >> 4, pairs & 15], axis=2).reshape(rows.size, -1) ^ np.uint8(8)
        return affine(codes[:, cols.start - 2 * around.start :][:, : cols.size], 4, scales, None, -1)
