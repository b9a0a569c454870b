"""Grouped-query attention (arXiv:2305.13245) over a paged cache, this rank's heads.

Shape legend: T tokens of the step, E hidden, H this rank's query heads, J its KV heads, D head width, C = (H + 2J) * D,
P positions, R half the rotary width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flm.kernels.backend import Backend, HeadNorm, KVCache
from flm.worker.layers.adapted import Adapted
from flm.worker.layers.loading import Loading, StepInputs
from flm.worker.layers.positions import alibi_slopes, logn_scales
from flm.worker.layers.rope import rope_tables

Array = Any


class Rotary:
    """What all layers share of positions: rotary tables, scales of q, slopes of this rank's heads."""

    def __init__(self, loading: Loading, positions: int) -> None:
        a, heads, asarray = loading.shard.model.attention, loading.shard.heads, loading.backend.asarray
        cos_PR, sin_PR = rope_tables(a.rope, positions)
        self.cos_PR, self.sin_PR = asarray(cos_PR), asarray(sin_PR)
        self.q_scale_P = asarray(logn_scales(a.logn_length, np.arange(positions))) if a.logn_length else None
        self.slopes_H = asarray(alibi_slopes(a.heads)[heads.start : heads.stop]) if a.alibi else None

    def tables(self, inputs: StepInputs) -> tuple[Array, Array, Array | None]:
        """cos, sin [rows, R] and q's scales [rows]: the step's own where requests rotate differently."""
        if inputs.cos_TR is None:
            return self.cos_PR, self.sin_PR, self.q_scale_P
        return inputs.cos_TR, inputs.sin_TR, inputs.q_scale_T


class Attention:
    """One layer's attention. The sum over ranks is left to the caller."""

    def __init__(self, loading: Loading, prefix: str, rotary: Rotary, cache: KVCache) -> None:
        w, s, a = loading.weights, loading.shard, loading.shard.model.attention
        self._ops: Backend = loading.backend
        self._rotary, self.cache, self._scale = rotary, cache, a.scale
        parts = [("q_proj", s.q_rows), ("k_proj", s.kv_rows), ("v_proj", s.kv_rows)]
        self.qkv = loading.pack(w.stored_below(prefix, parts))
        self.qkv_bias = loading.vector(w.fused_bias(prefix, parts))
        self.output = loading.pack(w.stored(prefix + "o_proj.weight", None, s.value_cols))
        self.output_bias = loading.vector(w.bias_once(prefix + "o_proj.bias"))
        self._adapted_qkv = Adapted(loading, prefix, parts)
        self._adapted_output = Adapted(loading, prefix, [("o_proj", s.value_cols)])
        self._head_norm: HeadNorm | None = None
        if a.qk_norm:
            q_D, k_D = (loading.vector(w.vector(f"{prefix}{name}.weight")) for name in ("q_norm", "k_norm"))
            self._head_norm = HeadNorm(q_D, k_D, s.model.norm.eps)
        heads, kv = s.heads.size, s.kv_heads.size
        self._qkv_TC = loading.workspace.array("qkv", (heads + 2 * kv) * a.head_dim)
        self._q_THD = loading.workspace.array("q", heads, a.head_dim)
        self._out_THD = loading.workspace.array("attended", heads, a.head_dim)

    def forward(self, h_TE: Array, delta_TE: Array, inputs: StepInputs) -> None:
        """delta = this rank's part of attention(h); writes the tokens' K and V to the cache."""
        ops, T, rows_T = self._ops, len(h_TE), inputs.rotary_rows_T
        qkv_TC, q_THD, out_THD = self._qkv_TC[:T], self._q_THD[:T], self._out_THD[:T]
        cos_PR, sin_PR, q_scale_P = self._rotary.tables(inputs)
        ops.linear(h_TE, self.qkv, qkv_TC, self.qkv_bias)
        self._adapted_qkv.add(h_TE, qkv_TC, inputs)
        ops.rope_kv_write(
            qkv_TC, rows_T, inputs.slots_T, cos_PR, sin_PR, self.cache, q_THD, self._head_norm, q_scale_P
        )
        ops.paged_attention(
            q_THD,
            self.cache,
            inputs.block_tables_SB,
            inputs.sequence_T,
            inputs.last_visible_T,
            self._scale,
            out_THD,
            self._rotary.slopes_H,
        )
        ops.linear(out_THD.reshape(T, -1), self.output, delta_TE, self.output_bias)
        self._adapted_output.add(out_THD.reshape(T, -1), delta_TE, inputs)
