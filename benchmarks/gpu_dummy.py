"""Whole models of a shape on a GPU, as the engine builds them, with random weights made there: speed depends on shapes alone.

Shape legend: M sequences, C matrices of one kind, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gpu_kernels import filled, some_codes

from flm.kernels.backend import SamplingBatch
from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.cuda.experts import CudaExperts
from flm.kernels.cuda.graph import CudaGraph
from flm.kernels.cuda.grouped import CudaGroup
from flm.kernels.cuda.pack import STEPS, CudaMatrix
from flm.kernels.expert_ops import Routing
from flm.kernels.quant import QuantizedMatrix
from flm.kernels.stored import StoredMatrix
from flm.worker.canonical import EMBEDDING, EXACT, LM_HEAD, decoder_tensors
from flm.worker.communication.comm import LocalCommunicator
from flm.worker.config import AttentionConfig, FeedForwardConfig, ModelConfig, ShardSpec, Span
from flm.worker.config_parts import ExpertsConfig, LatentConfig, NormConfig, RopeConfig
from flm.worker.execution.caches import make_caches
from flm.worker.execution.model import Decoder
from flm.worker.layers.experts import Experts
from flm.worker.layers.loading import StepInputs

Array = Any
Call = Callable[[], None]
GROUPS = (128, 64, 32)  # the first that divides a matrix' inputs

LLAMA_8B = ModelConfig(
    "Llama-3-8B", 4096, 32, 128256, 8192, NormConfig(1e-5),
    AttentionConfig(32, 8, 128, RopeConfig(5e5, 128)), FeedForwardConfig(14336),
)  # fmt: skip
DEEPSEEK_V2_LITE = ModelConfig(
    "DeepSeek-V2-Lite", 2048, 27, 102400, 163840, NormConfig(1e-6),
    AttentionConfig(16, 16, 192, RopeConfig(10000.0, 64), latent=LatentConfig(512, 128, 64, 128)),
    FeedForwardConfig(10944), ExpertsConfig(1408, Routing(64, 6), 2816, dense_layers=(0,)),
)  # fmt: skip
QWEN3_30B = ModelConfig(
    "Qwen3-30B-A3B", 2048, 48, 151936, 40960, NormConfig(1e-6),
    AttentionConfig(32, 4, 128, RopeConfig(1e6, 128), qk_norm=True),
    FeedForwardConfig(6144), ExpertsConfig(768, Routing(128, 8, normalize=True)),
)  # fmt: skip


class ShapedWeights:
    """Stands for ModelWeights: matrices without contents, vectors of ones. What the engine never rounds is float32."""

    def __init__(self, model: ModelConfig) -> None:
        self.shard = ShardSpec(model, 1, 0)
        self._specs = decoder_tensors(model)
        self.embedding = self.stored(EMBEDDING)
        self.lm_head = None if model.tie_embeddings else self.stored(LM_HEAD)
        self.lm_head_bias = None

    def matrix(self, name: str, rows: Span | None = None, cols: Span | None = None) -> QuantizedMatrix:
        n, k = self._specs[name].shape
        shape = (rows.size if rows else n, cols.size if cols else k)
        exact = name.endswith(EXACT)
        codes = np.broadcast_to(np.zeros(1, np.float32 if exact else np.uint16), shape)
        return QuantizedMatrix("float32" if exact else "bfloat16", shape, codes)

    def fused(self, prefix: str, parts: Sequence[tuple[str, Span]]) -> QuantizedMatrix:
        first = self.matrix(f"{prefix}{parts[0][0]}.weight")
        shape = (sum(span.size for _, span in parts), first.shape[1])
        return replace(first, shape=shape, codes=np.broadcast_to(first.codes[:1, :1], shape))

    def stored(self, name: str, rows: Span | None = None, cols: Span | None = None) -> StoredMatrix:
        return StoredMatrix.of(self.matrix(name, rows, cols))

    def stored_below(self, prefix: str, parts: Sequence[tuple[str, Span]]) -> StoredMatrix:
        return StoredMatrix.of(self.fused(prefix, parts))

    def fused_bias(self, prefix: str, parts: Sequence[tuple[str, Span]]) -> None:
        return None

    def bias_once(self, name: str) -> None:
        return None

    def vector(self, name: str, span: Span | None = None) -> Array:
        return np.ones(self._specs[name].shape, np.float32)

    def vector_or_none(self, name: str, span: Span | None = None) -> Array | None:
        return self.vector(name) if name in self._specs else None


class DummyBackend(CudaBackend):
    """A backend whose weights are random: "int4" with groups, where a matrix is not float32, or "float"."""

    format = "int4"

    def pack(self, matrix: QuantizedMatrix | StoredMatrix) -> CudaMatrix:
        whole = StoredMatrix.of(matrix).read(0, matrix.shape[0])
        return self._random(1, whole.shape, self._format_of(whole))[0]

    def pack_heads(self, heads: Iterable[QuantizedMatrix]) -> CudaGroup:
        matrices = list(heads)
        return self._group(len(matrices), matrices[0].shape, "float", False)

    def pack_experts(
        self, experts: Iterable[tuple[QuantizedMatrix, QuantizedMatrix]], first: int = 0
    ) -> CudaExperts:
        pairs = list(experts)
        (gate_up, down), format = pairs[0], self._format_of(pairs[0][0])
        up = self._group(len(pairs), (-(-gate_up.shape[0] // 16) * 16, gate_up.shape[1]), format, True)
        return CudaExperts(
            replace(up, outputs=down.shape[1]), self._group(len(pairs), down.shape, format, False), first
        )

    def _format_of(self, matrix: QuantizedMatrix) -> str:
        fits = any(matrix.shape[1] % group == 0 for group in GROUPS)
        return "float" if matrix.format == "float32" or not fits else self.format

    def _group(self, count: int, shape: tuple[int, int], format: str, gated: bool) -> CudaGroup:
        return CudaGroup(count, self._random(count, shape, format)[1], shape[0], gated)

    def _random(self, count: int, shape: tuple[int, int], format: str) -> tuple[CudaMatrix, CudaMatrix]:
        """A matrix, and the same as the first of `count`."""
        (n, k), kind = shape, self.activation
        tiles = (count, -(-n // 16), -(-k // (16 * STEPS[format])), 32, 4)
        codes, scales, group = filled(self.device, tiles, np.uint32, some_codes(format, kind)), None, 0
        if format != "float":
            group = next(g for g in GROUPS if k % g == 0)
            scale = np.full(1, k**-0.5 / 8, np.float16)
            groups = tiles[2] * 16 * STEPS[format] // group
            scales = filled(self.device, (*tiles[:2], groups, 16, 2), np.float16, scale.repeat(1 << 20))
        made = CudaMatrix(shape, format, kind, codes, scales, group // 16, k, None)
        one = replace(made, codes=codes[0], scales=None if scales is None else scales[0])
        return one, made


@dataclass(frozen=True, eq=False)
class DummyStep:
    """One token for each of M sequences of `context` tokens, through the engine's own layers."""

    model: ModelConfig
    backend: DummyBackend
    decoder: Decoder
    inputs: StepInputs
    sampled_S: Array
    M: int

    @classmethod
    def build(cls, backend: DummyBackend, model: ModelConfig, M: int, context: int) -> DummyStep:
        weights: Any = ShapedWeights(model)
        blocks = -(-context // 16)
        caches = make_caches(backend, weights.shard, M * blocks, 16, backend.activation, M)
        decoder = Decoder(weights, backend, LocalCommunicator(), caches, context, M, M)
        tables_MB = np.arange(M * blocks, dtype=np.int32).reshape(M, blocks)
        positions_M = np.full(M, context - 1, np.int32)
        slots_M = (tables_MB[:, -1] * 16 + (context - 1) % 16).astype(np.int32)
        numbers_M = np.arange(M, dtype=np.int32)
        on = backend.asarray
        ids, positions, slots, sequences, tables = map(
            on, (numbers_M, positions_M, slots_M, numbers_M, tables_MB)
        )
        inputs = StepInputs(ids, positions, slots, sequences, tables, positions, positions)
        return cls(model, backend, decoder, inputs, np.zeros(M, np.int32), M)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and of the cache that a step reads, of M tokens' experts no two the same."""
        total = 0
        for layer in self.decoder.layers:
            for part in (layer.attention, layer.feed_forward):
                total += _bytes_of(part, self.M)
        head = self.decoder.lm_head
        caches = sum(int(layer.attention.cache.nbytes) for layer in self.decoder.layers)  # type: ignore[union-attr]
        return total + int(head.nbytes) + caches

    def record(self) -> CudaGraph:
        """The step's ops; replay it three times before timing it."""
        with self.backend.capture() as graph:
            logits_SV = self.decoder.logits(self.decoder.hidden(self.inputs), None)
            self.backend.sample(logits_SV, SamplingBatch.greedy(self.M), self.sampled_S, None)
        return graph


def _bytes_of(part: Any, tokens: int) -> int:
    """Bytes of the weights that a layer's part reads."""
    if isinstance(part, Experts):
        read = tokens * part._config.routing.top_k + part.always
        share = min(1.0, read / part.experts.count)
        shared = 0 if part.shared is None else _bytes_of(part.shared, tokens)
        return int(part.experts.nbytes * share) + shared + int(part.router.nbytes)
    weights = [w for w in vars(part).values() if isinstance(w, CudaMatrix | CudaGroup)]
    return sum(int(w.nbytes) for w in weights)


def results_of(step: DummyStep, seconds: float, copy_rate: float) -> dict[str, Any]:
    """A line of the results. share: of the step's floor, the time that reading its bytes takes."""
    return {
        "what": f"{step.model.family} decode, batch {step.M}",
        "milliseconds": seconds * 1e3,
        "tokens_per_second": step.M / seconds,
        "share": step.nbytes / copy_rate / seconds,
    }


def expert_calls(
    backend: DummyBackend, sizes: tuple[int, int, int], tokens: int, chosen: int
) -> dict[str, tuple[list[Call], int]]:
    """The choice of experts, and what they make of a step's tokens; sizes: experts, hidden, width of one."""
    N, E, F = sizes
    matrix = lambda *shape: QuantizedMatrix("bfloat16", shape, np.broadcast_to(np.zeros(1, np.uint16), shape))
    layers = [backend.pack_experts([(matrix(2 * F, E), matrix(E, F))] * N) for _ in range(2)]
    rng, kind = np.random.default_rng(0), backend.activation
    logits = backend.asarray(rng.standard_normal((tokens, N)).astype(np.float32))
    ids, weights = backend.empty((tokens, chosen), np.int32), backend.empty((tokens, chosen))
    routing = Routing(N, chosen)
    route = lambda: backend.route(logits, routing, None, ids, weights)
    route()
    distinct = len(np.unique(backend.to_host(ids)))
    x, out = backend.empty((tokens, E), kind), backend.empty((tokens, E), kind)
    x[...] = 0
    shape = f"{distinct} of {N} experts {E}x{F}, {tokens} tokens"
    run = [lambda e=e: backend.expert_mlp(x, e, ids, weights, out) for e in layers]  # type: ignore[misc]
    return {
        f"choice of experts, {N}, {tokens} tokens": ([route], tokens * (N + 2 * chosen) * 4),
        f"int4 {shape}": (run, layers[0].nbytes * distinct // N + 4 * tokens * E),
    }


def latent_calls(
    backend: DummyBackend, batch: int, context: int, heads: tuple[int, int, int]
) -> tuple[list[Call], int]:
    """One decode step's latent attention of one layer; heads: their number, the latent's width, the rotary width."""
    H, L, D = heads
    blocks = -(-context // 16)
    caches = backend.latent_caches(4, batch * blocks, 16, L, D)
    order = np.random.default_rng(0).permutation(batch * blocks).astype(np.int32)
    tables = backend.asarray(order.reshape(batch, blocks))
    index = backend.asarray(np.arange(batch, dtype=np.int32))
    positions = backend.asarray(np.full(batch, context - 1, np.int32))
    q, rope, out = (backend.empty((batch, H, n), backend.activation) for n in (L, D, L))
    q[...] = 0
    rope[...] = 0
    return [
        lambda c=c: backend.latent_attention(q, rope, c, tables, index, positions, 0.1, out)  # type: ignore[misc]
        for c in caches
    ], caches[0].nbytes
