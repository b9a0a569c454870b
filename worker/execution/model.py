"""The decoder: what one rank computes for T tokens, as a fixed list of backend ops on fixed buffers.

Shape legend: T tokens of the step, E hidden, V this rank's vocabulary rows, S rows to sample.

There is no rank arithmetic here: shards come ready-made, and every sum over ranks is the communicator's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.backend import Backend, KVCache, PackedMatrix
from flm.kernels.latent_ops import LatentCache
from flm.kernels.stored import StoredMatrix
from flm.worker.adapters.adapter import Adapter
from flm.worker.canonical import EMBEDDING_NORM, SANDWICH_NORMS, layer_prefix
from flm.worker.checkpoints.weights import ModelWeights
from flm.worker.communication.comm import Communicator
from flm.worker.config import ShardSpec
from flm.worker.layers.attention import Attention, Rotary
from flm.worker.layers.experts import Experts
from flm.worker.layers.feed_forward import FeedForward
from flm.worker.layers.latent_attention import LatentAttention
from flm.worker.layers.loading import Loading, StepInputs, Workspace
from flm.worker.layers.norm import Norm
from flm.worker.layers.recurrence import ChannelMix, RecurrentState, TimeMix

Array = Any


@dataclass(frozen=True)
class Layer:
    """One layer: each part reads a norm of x, and what it gives is added to x, through `outer_norms` where the model has
    them. Without a norm of its own the feed-forward part reads what the attention reads, and both are added together."""

    input_norm: Norm
    attention: Attention | LatentAttention | TimeMix
    post_norm: Norm | None
    feed_forward: FeedForward | Experts | ChannelMix
    outer_norms: tuple[Norm, Norm] | None


class Decoder:
    """A decoder's shard on one rank."""

    def __init__(
        self,
        weights: ModelWeights,
        backend: Backend,
        comm: Communicator,
        caches: list[KVCache] | list[LatentCache] | list[RecurrentState],
        positions: int,
        max_tokens: int,
        max_rows: int,
        pack: Callable[[StoredMatrix], PackedMatrix] | None = None,
        adapters: tuple[Adapter, ...] = (),
    ) -> None:
        """`positions`: of the longest sequence; `max_tokens`, `max_rows`: of a step, computed and sampled. Tokens name their
        adapter by its place in `adapters`."""
        self.shard: ShardSpec = weights.shard
        self.backend, self.comm = backend, comm
        m, pack = weights.shard.model, pack or backend.pack
        self.adapters = tuple(adapter.name for adapter in adapters)
        loading = Loading(weights, backend, Workspace(backend, max_tokens), pack, adapters)
        self.embedding = pack(weights.embedding)
        head = weights.lm_head
        self.lm_head = self.embedding if head is None else pack(head)
        self.lm_head_bias = loading.vector(weights.lm_head_bias)
        self.rotary = Rotary(loading, positions)
        self.layers = [self._layer(loading, i, cache) for i, cache in enumerate(caches)]
        self.final_norm = Norm(loading, "model.norm", gain=m.logit_scale, eps=m.norm.final_eps)
        self.embedding_norm = Norm(loading, EMBEDDING_NORM) if m.embedding_norm else None
        self._x_TE = loading.workspace.array("x", m.hidden, dtype=np.float32)
        self._delta_TE = loading.workspace.array("delta", m.hidden)
        self._h_TE = loading.workspace.array("h", m.hidden)
        self._embedding_scale = m.embedding_scale / m.residual_scale  # see Norm
        self._rows_SE = backend.empty((max_rows, m.hidden), backend.activation)
        self._local_SV = backend.empty((max_rows, self.shard.vocab.size))
        self._logits_SV = self._local_SV if self.shard.tp_size == 1 else backend.empty((max_rows, m.vocab))
        self._widths = tuple(self.shard.for_rank(r).vocab.size for r in range(self.shard.tp_size))

    def set_caches(self, caches: list[KVCache] | list[LatentCache]) -> None:
        """Other caches in place of those that it was made with, before any step is captured."""
        for layer, cache in zip(self.layers, caches, strict=True):
            assert not isinstance(layer.attention, TimeMix), "states are not sized by what is free"
            layer.attention.cache = cache  # type: ignore[assignment]

    def _layer(self, loading: Loading, number: int, cache: Any) -> Layer:
        prefix, m = layer_prefix(number), self.shard.model
        input_norm = Norm(loading, prefix + "input_layernorm")
        post_norm = None if m.feed_forward.parallel else Norm(loading, prefix + "post_attention_layernorm")
        attention = self._attention(loading, prefix + "self_attn.", cache)
        feed_forward = self._feed_forward(loading, prefix + "mlp.", number, cache)
        outer = [Norm(loading, prefix + name, scale=1.0) for name in SANDWICH_NORMS if m.norm.sandwich]
        return Layer(input_norm, attention, post_norm, feed_forward, (outer[0], outer[1]) if outer else None)

    def _attention(self, loading: Loading, prefix: str, cache: Any) -> Attention | LatentAttention | TimeMix:
        a = self.shard.model.attention
        if a.recurrent:
            return TimeMix(loading, prefix, cache)
        return (LatentAttention if a.latent else Attention)(loading, prefix, self.rotary, cache)

    def _feed_forward(
        self, loading: Loading, prefix: str, number: int, cache: Any
    ) -> FeedForward | Experts | ChannelMix:
        m = self.shard.model
        if m.attention.recurrent:
            return ChannelMix(loading, prefix, cache)
        if m.is_sparse(number):
            return Experts(loading, prefix)
        return FeedForward(loading, prefix, self.shard.intermediate)

    def expert_counts(self) -> dict[int, NDArray[np.int64]]:
        """By layer, for those that have experts: how many tokens chose each one so far. From any thread; where steps are
        under way on a device, it waits for those once, and not for each layer."""
        parts = enumerate(layer.feed_forward for layer in self.layers)
        counts = {i: p.counts_N for i, p in parts if isinstance(p, Experts)}
        return dict(zip(counts, self.backend.fetch(list(counts.values()))(), strict=True)) if counts else {}

    def residual(self, tokens: int) -> Array:
        """What layers add to [T, E], as a step of so many tokens has left it."""
        return self._x_TE[:tokens]

    def hidden(self, inputs: StepInputs) -> Array:
        """Final normed hidden states [T, E] of the step's tokens; writes their K and V to the caches."""
        T = len(inputs.ids_T)
        x_TE, h_TE, delta_TE = self._x_TE[:T], self._h_TE[:T], self._delta_TE[:T]
        first, scale = self.shard.vocab.start, self._embedding_scale
        self.backend.embedding(self.embedding, inputs.ids_T, x_TE, first, scale)
        self.comm.all_reduce(x_TE)
        if self.embedding_norm is not None:
            self.embedding_norm.forward(x_TE, None, x_TE)
        self.layers[0].input_norm.forward(x_TE, None, h_TE)
        following = [*(layer.input_norm for layer in self.layers[1:]), self.final_norm]
        for layer, next_norm in zip(self.layers, following, strict=True):
            outer = layer.outer_norms or (None, None)
            layer.attention.forward(h_TE, delta_TE, inputs)
            if layer.post_norm is not None:
                self._add(x_TE, delta_TE, outer[0], layer.post_norm, h_TE)
            layer.feed_forward.forward(h_TE, delta_TE, inputs)
            self._add(x_TE, delta_TE, outer[1], next_norm, h_TE)
        return h_TE

    def _add(self, x_TE: Array, delta_TE: Array, outer: Norm | None, norm: Norm, h_TE: Array) -> None:
        """x += the sum over ranks of a part's delta, through the part's outer norm; h = what the next part reads."""
        if outer is None and norm.root_mean_square:
            self.comm.all_reduce_rms_norm(self.backend, x_TE, delta_TE, norm.weight, norm.eps, h_TE)
            return
        self.comm.all_reduce(delta_TE)
        if outer is not None:
            outer.forward(delta_TE, None, delta_TE)
        norm.forward(x_TE, delta_TE, h_TE)

    def logits(self, h_TE: Array, rows_S: Array | None) -> Array:
        """Logits [S, vocab] of the chosen rows of h (None: all of its rows, in order), on every rank."""
        S = len(h_TE) if rows_S is None else len(rows_S)
        picked_SE = h_TE
        if rows_S is not None:
            picked_SE = self._rows_SE[:S]
            self.backend.take_rows(h_TE, rows_S, picked_SE)
        local_SV, logits_SV = self._local_SV[:S], self._logits_SV[:S]
        self.backend.linear(picked_SE, self.lm_head, local_SV, self.lm_head_bias)
        self.comm.all_gather_cols(local_SV, logits_SV if self.shard.tp_size > 1 else local_SV, self._widths)
        return logits_SV
