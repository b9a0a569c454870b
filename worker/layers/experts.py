"""Mixture of experts (DeepSeekMoE, arXiv:2401.06066): this rank's experts, or its columns of all of them.

Every rank routes alike, for all have the same router and the same hidden states; what ranks give is summed like any other
part of a layer. Shape legend: T tokens of the step, E hidden, N experts of the layer, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from flm.kernels.backend import Backend
from flm.kernels.expert_ops import ExpertOps
from flm.kernels.quant import QuantizedMatrix
from flm.worker.config import Span
from flm.worker.errors import BackendUnavailable
from flm.worker.layers.feed_forward import FeedForward
from flm.worker.layers.loading import Loading, StepInputs

Array = Any


class Experts:
    """One layer's experts. The sum over ranks is left to the caller.

    counts_N: int64, how many tokens chose each expert so far, the same on every rank.
    """

    def __init__(self, loading: Loading, prefix: str) -> None:
        config, w, shard = loading.shard.model.experts, loading.weights, loading.shard
        assert config is not None, "a layer without experts"
        self._backend: Backend = loading.backend
        self._ops, self._config = expert_ops(loading.backend), config
        self.router = loading.pack(w.stored(prefix + "gate.weight"))
        self.bias = loading.vector(w.vector_or_none(prefix + "gate.correction_bias"))
        matrices = _matrices(loading, prefix)
        first, shared = next(matrices), _shared(loading, prefix) if self._ops.merges_shared else []
        if any(_layout(pair) != _layout(first) for pair in shared):
            shared = []
        self.experts = self._ops.pack_experts(chain([first], matrices, shared), shard.experts.start)
        apart = config.shared and not shared
        self.shared = FeedForward(loading, prefix + "shared.", shard.shared_width) if apart else None
        self.gate = loading.pack(w.stored(prefix + "shared_gate.weight")) if config.shared_gate else None
        self.counts_N = loading.backend.asarray(np.zeros(config.count, np.int64))
        array, routing = loading.workspace.array, config.routing
        self._logits_TN, self._gate_T1 = (
            array(name, size, dtype=np.float32)
            for name, size in (("router", routing.experts), ("shared_gate", 1))
        )
        chosen, self.always = routing.top_k, len(shared)
        self._ids_TK = array("experts", chosen + self.always, dtype=np.int32)
        self._weights_TK = array("expert_weights", chosen + self.always, dtype=np.float32)
        if (
            shared
        ):  # every token chooses them, with a weight of one; the columns before are written in every step
            ids_TK, weights_TK = (
                np.zeros(self._ids_TK.shape, np.int32),
                np.ones(self._ids_TK.shape, np.float32),
            )
            ids_TK[:, chosen:] = np.arange(self.always) + shard.experts.stop
            self._ids_TK[...] = loading.backend.asarray(ids_TK)
            self._weights_TK[...] = loading.backend.asarray(weights_TK)

    def forward(self, h_TE: Array, delta_TE: Array, inputs: StepInputs) -> None:
        """delta = this rank's part of the experts' answers to h."""
        T = len(h_TE)
        if self.shared is not None:
            self.shared.forward(h_TE, delta_TE, inputs)
        if self.gate is not None:
            self._backend.linear(h_TE, self.gate, self._gate_T1[:T])
            self._ops.sigmoid_scale(self._gate_T1[:T], delta_TE)
        logits_TN, ids_TK, weights_TK = self._logits_TN[:T], self._ids_TK[:T], self._weights_TK[:T]
        self._backend.linear(h_TE, self.router, logits_TN)
        counts_N, sequence_T = self.counts_N, inputs.sequence_T
        self._ops.route(logits_TN, self._config.routing, self.bias, ids_TK, weights_TK, counts_N, sequence_T)
        self._ops.expert_mlp(h_TE, self.experts, ids_TK, weights_TK, delta_TE, self.shared is not None)


def expert_ops(backend: Backend) -> ExpertOps:
    """The backend itself. Raises BackendUnavailable where it cannot run experts."""
    if not isinstance(backend, ExpertOps):
        raise BackendUnavailable("this device cannot run mixtures of experts yet; use device: cpu")
    return backend


Pair = tuple[QuantizedMatrix, QuantizedMatrix]


def _matrices(loading: Loading, prefix: str) -> Iterator[Pair]:
    """Gate over up, and down, of one of this rank's experts after the other."""
    shard = loading.shard
    for expert in range(shard.experts.start, shard.experts.stop):
        yield _pair(loading, f"{prefix}experts.{expert}.", shard.expert_width)


def _pair(loading: Loading, prefix: str, span: Span) -> Pair:
    gate_up = loading.weights.fused(prefix, [("gate_proj", span), ("up_proj", span)])
    return gate_up, loading.weights.matrix(prefix + "down_proj.weight", None, span)


def _shared(loading: Loading, prefix: str) -> list[Pair]:
    """The expert that all tokens go through, cut in pieces as wide as the others; empty where that cannot be."""
    shard, config = loading.shard, loading.shard.model.experts
    assert config is not None
    span, width, held = shard.shared_width, shard.expert_width.size, shard.experts.size
    if config.shared_gate or loading.adapters or held != config.count or not width or span.size % width:
        return []
    starts = range(span.start, span.stop, width)
    return [_pair(loading, prefix + "shared.", Span(start, start + width)) for start in starts]


def _layout(pair: Pair) -> list[tuple[Any, ...]]:
    """What experts of one product have to have in common."""
    kind = lambda array: None if array is None else array.dtype
    return [(m.format, m.shape, m.group, kind(m.scales), kind(m.offsets), m.gather is not None) for m in pair]
