"""The decoder: what one rank computes for T tokens, as a fixed list of backend ops on fixed buffers.

Shape legend: T tokens of the step, E hidden, H this rank's query heads, J its KV heads, D head width,
F its feed-forward width, V its vocabulary rows, S rows to sample, R half the rotary width, P positions.

There is no rank arithmetic here: shards come ready-made, and every sum over ranks is `comm.all_reduce`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flm.kernels.backend import Backend, KVCache, PackedMatrix
from flm.kernels.quant import QuantizedMatrix
from flm.worker.comm import Communicator
from flm.worker.config import ShardSpec
from flm.worker.rope import rope_tables
from flm.worker.weights import LayerWeights, ModelWeights

Array = Any


@dataclass(frozen=True)
class Layer:
    """One layer's weights in the backend's layout; None where the model has no such bias."""

    input_norm: Array
    qkv: PackedMatrix
    qkv_bias: Array | None
    output: PackedMatrix
    output_bias: Array | None
    post_norm: Array
    gate_up: PackedMatrix
    gate_up_bias: Array | None
    down: PackedMatrix
    down_bias: Array | None


@dataclass(frozen=True)
class StepInputs:
    """Device arrays of one step, all int32: ids_T, positions_T, slots_T (cache slot each token is written to),
    sequence_T (row of block_tables_SB) and block_tables_SB (block numbers of every known sequence)."""

    ids_T: Array
    positions_T: Array
    slots_T: Array
    sequence_T: Array
    block_tables_SB: Array


class Buffers:
    """Activations for up to max_tokens tokens and logits for up to max_rows rows. A step of T tokens uses
    the first T rows of each, so that a captured step finds everything where it was."""

    def __init__(self, backend: Backend, shard: ShardSpec, max_tokens: int, max_rows: int) -> None:
        m, heads, kv = shard.model, shard.heads.size, shard.kv_heads.size
        self.x_TE = backend.empty((max_tokens, m.hidden))
        self.h_TE = backend.empty((max_tokens, m.hidden))
        self.delta_TE = backend.empty((max_tokens, m.hidden))
        self.qkv_TC = backend.empty((max_tokens, (heads + 2 * kv) * m.head_dim))
        self.q_THD = backend.empty((max_tokens, heads, m.head_dim))
        self.attn_THD = backend.empty((max_tokens, heads, m.head_dim))
        self.gate_up_T2F = backend.empty((max_tokens, 2 * shard.intermediate.size))
        self.act_TF = backend.empty((max_tokens, shard.intermediate.size))
        self.rows_SE = backend.empty((max_rows, m.hidden))
        self.local_SV = backend.empty((max_rows, shard.vocab.size))
        self.logits_SV = self.local_SV if shard.tp_size == 1 else backend.empty((max_rows, m.vocab))


class Decoder:
    """A decoder's shard on one rank."""

    def __init__(
        self,
        weights: ModelWeights,
        shard: ShardSpec,
        backend: Backend,
        comm: Communicator,
        caches: list[KVCache],
        positions: int,
        max_tokens: int,
        max_rows: int,
        pack: Callable[[QuantizedMatrix], PackedMatrix] | None = None,
    ) -> None:
        self.shard, self.backend, self.comm, self.caches = shard, backend, comm, caches
        pack = pack or backend.pack
        self.embedding = pack(weights.embedding)
        head = weights.lm_head
        self.lm_head = self.embedding if head is None else pack(head)
        self.final_norm = backend.asarray(weights.final_norm)
        self.layers = [self._layer(layer, pack) for layer in weights.layers]
        cos_PR, sin_PR = rope_tables(shard.model.rope, positions)
        self.cos_PR, self.sin_PR = backend.asarray(cos_PR), backend.asarray(sin_PR)
        self.buffers = Buffers(backend, shard, max_tokens, max_rows)
        self._widths = tuple(shard.for_rank(r).vocab.size for r in range(shard.tp_size))

    def _layer(self, w: LayerWeights, pack: Callable[[QuantizedMatrix], PackedMatrix]) -> Layer:
        bias = lambda b: None if b is None else self.backend.asarray(b)
        return Layer(
            input_norm=self.backend.asarray(w.input_norm),
            qkv=pack(w.qkv),
            qkv_bias=bias(w.qkv_bias),
            output=pack(w.output),
            output_bias=bias(w.output_bias),
            post_norm=self.backend.asarray(w.post_norm),
            gate_up=pack(w.gate_up),
            gate_up_bias=bias(w.gate_up_bias),
            down=pack(w.down),
            down_bias=bias(w.down_bias),
        )

    def hidden(self, inputs: StepInputs) -> Array:
        """Final normed hidden states [T, E] of the step's tokens; writes their K and V to the caches."""
        b, ops, m = self.buffers, self.backend, self.shard.model
        T = len(inputs.ids_T)
        x_TE, h_TE, delta_TE = b.x_TE[:T], b.h_TE[:T], b.delta_TE[:T]
        ops.embedding(self.embedding, inputs.ids_T, x_TE, self.shard.vocab.start)
        self.comm.all_reduce(x_TE)
        for i, (layer, cache) in enumerate(zip(self.layers, self.caches, strict=True)):
            if i == 0:
                ops.rms_norm(x_TE, layer.input_norm, m.norm_eps, h_TE)
            else:
                ops.add_rms_norm(x_TE, delta_TE, layer.input_norm, m.norm_eps, h_TE)
            self._attention(layer, cache, h_TE, delta_TE, inputs)
            ops.add_rms_norm(x_TE, delta_TE, layer.post_norm, m.norm_eps, h_TE)
            self._mlp(layer, h_TE, delta_TE)
        ops.add_rms_norm(x_TE, delta_TE, self.final_norm, m.norm_eps, h_TE)
        return h_TE

    def _attention(
        self, layer: Layer, cache: KVCache, h_TE: Array, delta_TE: Array, inputs: StepInputs
    ) -> None:
        b, ops, T = self.buffers, self.backend, len(h_TE)
        qkv_TC, q_THD, attn_THD = b.qkv_TC[:T], b.q_THD[:T], b.attn_THD[:T]
        ops.linear(h_TE, layer.qkv, qkv_TC, layer.qkv_bias)
        ops.rope_kv_write(qkv_TC, inputs.positions_T, inputs.slots_T, self.cos_PR, self.sin_PR, cache, q_THD)
        scale = self.shard.model.head_dim**-0.5
        ops.paged_attention(
            q_THD, cache, inputs.block_tables_SB, inputs.sequence_T, inputs.positions_T, scale, attn_THD
        )
        ops.linear(attn_THD.reshape(T, -1), layer.output, delta_TE, layer.output_bias)
        self.comm.all_reduce(delta_TE)

    def _mlp(self, layer: Layer, h_TE: Array, delta_TE: Array) -> None:
        b, ops, T = self.buffers, self.backend, len(h_TE)
        gate_up_T2F, act_TF = b.gate_up_T2F[:T], b.act_TF[:T]
        ops.linear(h_TE, layer.gate_up, gate_up_T2F, layer.gate_up_bias)
        ops.silu_mul(gate_up_T2F, act_TF)
        ops.linear(act_TF, layer.down, delta_TE, layer.down_bias)
        self.comm.all_reduce(delta_TE)

    def logits(self, h_TE: Array, rows_S: Array | None) -> Array:
        """Logits [S, vocab] of the chosen rows of h (None: all of its rows, in order), on every rank."""
        b, ops = self.buffers, self.backend
        S = len(h_TE) if rows_S is None else len(rows_S)
        picked_SE = h_TE
        if rows_S is not None:
            picked_SE = b.rows_SE[:S]
            ops.take_rows(h_TE, rows_S, picked_SE)
        local_SV, logits_SV = b.local_SV[:S], b.logits_SV[:S]
        ops.linear(picked_SE, self.lm_head, local_SV)
        self.comm.all_gather_cols(local_SV, logits_SV if self.shard.tp_size > 1 else local_SV, self._widths)
        return logits_SV


def kv_blocks_for(shard: ShardSpec, block_size: int, itemsize: int, kv_bytes: int, most: int) -> int:
    """Blocks that fit `kv_bytes` on the rank that holds the most KV heads, so that all ranks have as many;
    never more than `most`."""
    kv_heads = max(shard.for_rank(r).kv_heads.size for r in range(shard.tp_size))
    per_block = 2 * shard.model.layers * kv_heads * shard.model.head_dim * itemsize * block_size
    return max(min(kv_bytes // per_block, most), 0)


KV_DTYPES = {"auto": np.float32, "float32": np.float32, "float16": np.float16}
