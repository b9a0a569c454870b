"""A decode step of a whole model shape on a GPU: random weights made there, recorded as one CUDA graph.

Shape legend: M sequences, E hidden, F feed-forward width, H query heads, J key-value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gpu_kernels import random_matrix, zeros

from flm.kernels.backend import SamplingBatch
from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.cuda.graph import CudaGraph


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    name: str
    layers: int
    E: int
    F: int
    H: int
    J: int
    D: int
    V: int


LLAMA_8B = Shape("Llama-3-8B", 32, 4096, 14336, 32, 8, 128, 128256)
QWEN_72B = Shape("Qwen2-72B", 80, 8192, 29696, 64, 8, 128, 152064)


class DecodeStep:
    """One token for each of M sequences of `context` tokens. format: "int4" or "float" (16 bits)."""

    def __init__(self, backend: CudaBackend, shape: Shape, format: str, M: int, context: int) -> None:
        self.backend, self.shape, self.M = backend, shape, M
        s, device, kind = shape, backend.device, backend.activation
        make = lambda n, k: random_matrix(device, n, k, format, kind)
        self.layers = [
            (make((s.H + 2 * s.J) * s.D, s.E), make(s.E, s.H * s.D), make(2 * s.F, s.E), make(s.E, s.F))
            for _ in range(s.layers)
        ]
        self.embedding, self.head = make(s.V, s.E), make(s.V, s.E)
        blocks = -(-context // 16)
        self.caches = backend.kv_caches(s.layers, M * blocks, 16, s.J, s.D)
        self.norm = device.asarray(np.ones(s.E, np.float32))
        self.table = zeros(device, (context, s.D // 2), "float32")
        self.x, self.logits = device.empty((M, s.E), "float32"), device.empty((M, s.V), "float32")
        widths = {"h": s.E, "delta": s.E, "qkv": (s.H + 2 * s.J) * s.D, "gate_up": 2 * s.F, "act": s.F}
        self.at = {name: device.empty((M, width), kind) for name, width in widths.items()}
        self.q, self.out = (device.empty((M, s.H, s.D), kind) for _ in range(2))
        self.ids, self.positions = np.zeros(M, np.int32), np.full(M, context - 1, np.int32)
        self.index, self.sampled = np.arange(M, dtype=np.int32), np.zeros(M, np.int32)
        self.tables = np.arange(M * blocks, dtype=np.int32).reshape(M, blocks)
        self.slots = (self.tables[:, -1] * 16 + (context - 1) % 16).astype(np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and keys and values that a step reads."""
        weights = sum(w.nbytes for layer in self.layers for w in layer) + self.head.nbytes
        return weights + sum(cache.nbytes for cache in self.caches)

    def record(self) -> CudaGraph:
        """The step's ops; replay it three times before timing it."""
        with self.backend.capture() as graph:
            self._ops()
        return graph

    def _ops(self) -> None:
        ops, at, x = self.backend, self.at, self.x
        ops.embedding(self.embedding, self.ids, x)
        for i, ((qkv, output, gate_up, down), cache) in enumerate(zip(self.layers, self.caches, strict=True)):
            self._norm(i > 0)
            ops.linear(at["h"], qkv, at["qkv"])
            ops.rope_kv_write(at["qkv"], self.positions, self.slots, self.table, self.table, cache, self.q)
            ops.paged_attention(
                self.q, cache, self.tables, self.index, self.positions, self.shape.D**-0.5, self.out
            )
            ops.linear(self.out.reshape(self.M, -1), output, at["delta"])
            self._norm(True)
            ops.linear(at["h"], gate_up, at["gate_up"])
            ops.silu_mul(at["gate_up"], at["act"])
            ops.linear(at["act"], down, at["delta"])
        self._norm(True)
        ops.linear(at["h"], self.head, self.logits)
        ops.sample(self.logits, SamplingBatch.greedy(self.M), self.sampled, None)

    def _norm(self, add: bool) -> None:
        ops, at = self.backend, self.at
        if add:
            ops.add_rms_norm(self.x, at["delta"], self.norm, 1e-5, at["h"])
        else:
            ops.rms_norm(self.x, self.norm, 1e-5, at["h"])


def results_of(step: DecodeStep, seconds: float, copy_rate: float) -> dict[str, Any]:
    """A line of the results. share: of the step's floor, the time that reading its bytes takes."""
    return {
        "what": f"{step.shape.name} decode, batch {step.M}",
        "milliseconds": seconds * 1e3,
        "tokens_per_second": step.M / seconds,
        "share": step.nbytes / copy_rate / seconds,
    }
