"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), this rank's heads over a cache of latents.

The rows of kv_b_proj that would expand a latent to a head's key are multiplied into the query instead, and those that would
expand it to a value into the output, for prompts as for single tokens: both give a token the same bits.

Shape legend: T tokens of the step, E hidden, H this rank's heads, N unrotated and D rotated columns of a query, L the
latent's width, M values of a head's output, P positions, R = D / 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from flm.kernels.backend import Backend
from flm.kernels.latent_ops import LatentCache, LatentOps
from flm.kernels.quant import QuantizedMatrix, from_float
from flm.worker.config import Span
from flm.worker.config_parts import LatentConfig
from flm.worker.errors import BackendUnavailable
from flm.worker.layers.adapted import Adapted
from flm.worker.layers.attention import Rotary
from flm.worker.layers.loading import Loading, StepInputs

Array = Any


class LatentAttention:
    """One layer's attention. The sum over ranks is left to the caller."""

    def __init__(self, loading: Loading, prefix: str, rotary: Rotary, cache: LatentCache) -> None:
        w, shard, a = loading.weights, loading.shard, loading.shard.model.attention
        assert a.latent is not None, "a model without latent attention"
        c, heads = a.latent, shard.heads.size
        self._backend: Backend = loading.backend
        self._ops, self._config = latent_ops(loading.backend), c
        self._rotary, self.cache, self._scale = rotary, cache, a.scale
        self.query_a = loading.pack(w.stored(prefix + "q_a_proj.weight")) if c.query_rank else None
        self.query_norm = loading.vector(w.vector_or_none(prefix + "q_a_layernorm.weight"))
        self.query = loading.pack(w.stored(prefix + "q_proj.weight", shard.q_rows))
        self.latent = loading.pack(w.stored(prefix + "kv_a_proj.weight"))
        self.latent_norm = loading.vector(w.vector(prefix + "kv_a_layernorm.weight"))
        if c.turned_keys:
            key = w.matrix(prefix + "k_b_proj.weight", shard.heads.scaled(c.rank))
            value = w.matrix(prefix + "v_b_proj.weight", shard.heads.scaled(c.value))
            parts = _rows_of_heads(key, heads, c.rank), _rows_of_heads(value, heads, c.value)
        else:
            both = w.matrix(prefix + "kv_b_proj.weight", shard.heads.scaled(c.plain + c.value))
            parts = _keys(both, c, heads), _values(both, c, heads)
        self.key, self.value = (self._ops.pack_heads(part) for part in parts)
        self.output = loading.pack(w.stored(prefix + "o_proj.weight", None, shard.value_cols))
        self._adapted = {
            name: Adapted(loading, prefix, [(name, span)])
            for name, span in (
                ("q_a_proj", Span(0, c.query_rank)),
                ("q_proj", shard.q_rows),
                ("kv_a_proj", Span(0, c.cached)),
                ("o_proj", shard.value_cols),
            )
        }
        array = loading.workspace.array
        self._query_TQ, self._kv_TC = array("query_latent", c.query_rank or 1), array("latent", c.cached)
        self._q_THC = array("latent_q", heads, c.plain + c.rotary)
        self._plain_THN, self._rope_THD = (
            array("plain_q", heads, c.plain),
            array("rotated_q", heads, c.rotary),
        )
        self._q_THL, self._out_THL = array("absorbed_q", heads, c.rank), array("latents", heads, c.rank)
        self._values_THM = array("values", heads, c.value)

    def forward(self, h_TE: Array, delta_TE: Array, inputs: StepInputs) -> None:
        """delta = this rank's part of attention(h); writes the tokens' latents and rotated keys to the cache."""
        ops, T = self._ops, len(h_TE)
        q_THC, kv_TC, values_THM = self._q_THC[:T], self._kv_TC[:T], self._values_THM[:T]
        plain_THN, rope_THD = self._plain_THN[:T], self._rope_THD[:T]
        q_THL, out_THL = self._q_THL[:T], self._out_THL[:T]
        cos_PR, sin_PR, _ = self._rotary.tables(inputs)
        self._queries(h_TE, q_THC.reshape(T, -1), inputs)
        self._backend.linear(h_TE, self.latent, kv_TC)
        self._adapted["kv_a_proj"].add(h_TE, kv_TC, inputs)
        ops.latent_rope_write(
            q_THC,
            kv_TC,
            self.latent_norm,
            self._config.norm_eps,
            inputs.rotary_rows_T,
            inputs.slots_T,
            cos_PR,
            sin_PR,
            self.cache,
            plain_THN,
            rope_THD,
        )
        ops.linear_heads(plain_THN, self.key, q_THL)
        tables_SB, sequence_T, positions_T = inputs.block_tables_SB, inputs.sequence_T, inputs.positions_T
        ops.latent_attention(
            q_THL, rope_THD, self.cache, tables_SB, sequence_T, positions_T, self._scale, out_THL
        )
        ops.linear_heads(out_THL, self.value, values_THM)
        self._backend.linear(values_THM.reshape(T, -1), self.output, delta_TE)
        self._adapted["o_proj"].add(values_THM.reshape(T, -1), delta_TE, inputs)

    def _queries(self, h_TE: Array, q_TC: Array, inputs: StepInputs) -> None:
        x_TK = h_TE
        if self.query_a is not None:
            x_TK = self._query_TQ[: len(h_TE)]
            self._backend.linear(h_TE, self.query_a, x_TK)
            self._adapted["q_a_proj"].add(h_TE, x_TK, inputs)
            self._backend.rms_norm(x_TK, self.query_norm, self._config.norm_eps, x_TK)
        self._backend.linear(x_TK, self.query, q_TC)
        self._adapted["q_proj"].add(x_TK, q_TC, inputs)


def latent_ops(backend: Backend) -> LatentOps:
    """The backend itself. Raises BackendUnavailable where it has no latent attention."""
    if not isinstance(backend, LatentOps):
        raise BackendUnavailable("this device cannot run multi-head latent attention yet; use device: cpu")
    return backend


def _rows_of_heads(matrix: QuantizedMatrix, heads: int, rows: int) -> Iterator[QuantizedMatrix]:
    return (matrix.slice_rows(h * rows, (h + 1) * rows) for h in range(heads))


def _keys(expand: QuantizedMatrix, c: LatentConfig, heads: int) -> Iterator[QuantizedMatrix]:
    """[L, N] per head: the rows that make its key, turned round. Integer and fp8 weights become float16, since their
    groups lie along the other side."""
    for h in range(heads):
        start = h * (c.plain + c.value)
        rows = expand.slice_rows(start, start + c.plain)
        if rows.scales is None:
            yield from_float(np.ascontiguousarray(rows.codes.T), rows.format)
        else:
            yield from_float(np.ascontiguousarray(rows.dequantize().T), "float16")


def _values(expand: QuantizedMatrix, c: LatentConfig, heads: int) -> Iterator[QuantizedMatrix]:
    """[M, L] per head: the rows that make its value."""
    for h in range(heads):
        start = h * (c.plain + c.value) + c.plain
        yield expand.slice_rows(start, start + c.value)
