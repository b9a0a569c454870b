"""CpuBackend: the Backend protocol on CPUs. Checks arguments, writes program rows; the work is in program.py.

Shape legend: see flm.kernels.backend.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.backend import HeadNorm, SamplingBatch
from flm.kernels.cpu.adapter_calls import AdapterCalls
from flm.kernels.cpu.arrays import (
    I32,
    CpuCache,
    address,
    check,
    columns,
    float_bits,
    make_caches,
    sampling_fields,
)
from flm.kernels.cpu.classic_calls import ClassicCalls
from flm.kernels.cpu.configure import load_kernels
from flm.kernels.cpu.emitter import SMALL
from flm.kernels.cpu.expert_calls import ExpertCalls
from flm.kernels.cpu.latent_calls import LatentCalls
from flm.kernels.cpu.layout import panel_bytes
from flm.kernels.cpu.pack import CpuMatrix, aligned, pack
from flm.kernels.cpu.recurrent_calls import RecurrentCalls
from flm.kernels.errors import ShapeError
from flm.kernels.group import Group
from flm.kernels.quant import QuantizedMatrix
from flm.kernels.staging import HostMemory
from flm.kernels.stored import StoredMatrix

Array = NDArray[Any]
TILE_ROWS = 24  # query rows of one attention task


class CpuBackend(HostMemory, AdapterCalls, ClassicCalls, ExpertCalls, LatentCalls, RecurrentCalls):
    """threads: how many this backend's ops may use. One thread at a time may call it."""

    activation = np.float32

    def empty(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        return aligned(shape, dtype)

    def asarray(self, host: Array) -> Array:
        return np.ascontiguousarray(host)

    def to_host(self, array: Array) -> Array:
        return array

    def pack(self, matrix: QuantizedMatrix | StoredMatrix) -> CpuMatrix:
        return pack(matrix, self._arena.take)

    def kv_caches(
        self,
        layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: Any = np.float32,
    ) -> list[CpuCache]:
        take = self._arena.take
        return make_caches(take, layers, num_blocks, block_size, kv_heads, head_dim, np.dtype(dtype))

    def linear(
        self,
        x_TK: Array,
        weight: CpuMatrix,
        out_TN: Array,
        bias_N: Array | None = None,
        accumulate: bool = False,
    ) -> None:
        T, (N, K) = columns("x", x_TK)[0], weight.shape
        x, out = check("x", x_TK, (T, K)), check("out", out_TN, (T, N))
        bias = 0 if bias_N is None else check("bias", bias_N, (N,))
        groups = weight.groups
        area = panel_bytes(weight.group)
        sums = (T * groups * 4 + 63) // 64 * 64
        scratch = self._scratch(area * self.threads + sums + T * groups * weight.group * 4)
        xsum = address(scratch) + area * self.threads
        row = [
            *weight.row(x, T),
            out,
            bias,
            int(accumulate),
            xsum,
            xsum + sums,
            address(weight.gather),
            address(scratch),
            area,
        ]
        row += [*self._weight_leaves(weight.form), N * 4]
        keep = (x_TK, weight, out_TN, bias_N, scratch)
        if weight.group:
            self._emit("prepare", row, *keep, workers=self._workers(T * K, 2 * SMALL))
        self._emit("linear", row, *keep, workers=self._workers(T * K * N, SMALL))

    def embedding(
        self, weight: CpuMatrix, ids_T: Array, out_TE: Array, first_row: int = 0, scale: float = 1.0
    ) -> None:
        weight.check_embeds()
        T = columns("ids", ids_T, 1)[0]
        ids, out = check("ids", ids_T, (T,), I32), check("out", out_TE, (T, weight.shape[1]))
        row = [*weight.row(ids, T), out, first_row, float_bits(scale)]
        self._emit("embedding", row, weight, ids_T, out_TE, workers=self._workers(out_TE.size, SMALL // 2))

    def rms_norm(self, x_TE: Array, weight_E: Array, eps: float, out_TE: Array) -> None:
        self._norm(x_TE, None, weight_E, eps, out_TE)

    def add_rms_norm(self, x_TE: Array, delta_TE: Array, weight_E: Array, eps: float, out_TE: Array) -> None:
        self._norm(x_TE, delta_TE, weight_E, eps, out_TE)

    def _norm(self, x_TE: Array, delta_TE: Array | None, weight_E: Array, eps: float, out_TE: Array) -> None:
        T, E = columns("x", x_TE)
        x, out, weight = (
            check("x", x_TE, (T, E)),
            check("out", out_TE, (T, E)),
            check("weight", weight_E, (E,)),
        )
        delta = 0 if delta_TE is None else check("delta", delta_TE, (T, E))
        row = [x, delta, T, E, weight, float_bits(eps), out]
        self._emit("norm", row, x_TE, delta_TE, weight_E, out_TE, workers=self._workers(T * E, 2 * SMALL))

    def silu_mul(self, gate_up_T2F: Array, out_TF: Array) -> None:
        T, F = columns("out", out_TF)
        gate_up, out = check("gate_up", gate_up_T2F, (T, 2 * F)), check("out", out_TF, (T, F))
        self._emit("silu_mul", [gate_up, out, T, F], gate_up_T2F, out_TF, workers=self._workers(T * F, SMALL))

    def rope_kv_write(
        self,
        qkv_TC: Array,
        positions_T: Array,
        slots_T: Array,
        cos_PR: Array,
        sin_PR: Array,
        cache: CpuCache,
        q_out_THD: Array,
        head_norm: HeadNorm | None = None,
        q_scale_P: Array | None = None,
    ) -> None:
        T, H, D = columns("q_out", q_out_THD, 3)
        J, (P, R), bs = cache.kv_heads, columns("cos", cos_PR), cache.block_size
        if cache.head_dim != D or 2 * R > D:
            raise ShapeError(
                f"heads of {cache.head_dim} and tables of at most half of that expected, got {D} and {R}"
            )
        qkv, q_out = check("qkv", qkv_TC, (T, (H + 2 * J) * D)), check("q_out", q_out_THD, (T, H, D))
        positions, slots = check("positions", positions_T, (T,), I32), check("slots", slots_T, (T,), I32)
        cos, sin = check("cos", cos_PR, (P, R)), check("sin", sin_PR, (P, R))
        half, scratch = int(cache.k.dtype == np.float16), self._scratch(2 * T * D * 4)
        row = [qkv, T, positions, slots, H, J, D, R, cache.v.shape[3], bs, half, cos, sin]
        row += [address(cache.k), address(cache.v), q_out, address(scratch)]
        norms = (
            [0, 0, 0]
            if head_norm is None
            else [
                check("q norm", head_norm.q_D, (D,)),
                check("k norm", head_norm.k_D, (D,)),
                float_bits(head_norm.eps),
            ]
        )
        row += [*norms, 0 if q_scale_P is None else check("q_scale", q_scale_P, (P,)), cache.stride]
        keep = (
            qkv_TC, positions_T, slots_T, cos_PR, sin_PR, cache, q_out_THD, scratch, head_norm, q_scale_P,
        )  # fmt: skip
        self._emit("rope_kv_write", row, *keep, workers=self._workers(qkv_TC.size, SMALL))

    def paged_attention(
        self,
        q_THD: Array,
        cache: CpuCache,
        block_tables_SB: Array,
        seq_index_T: Array,
        positions_T: Array,
        scale: float,
        out_THD: Array,
        slopes_H: Array | None = None,
    ) -> None:
        T, H, D = columns("q", q_THD, 3)
        (S, B), J, bs, Dp = (
            columns("block_tables", block_tables_SB),
            cache.kv_heads,
            cache.block_size,
            cache.v.shape[3],
        )
        q, out = check("q", q_THD, (T, H, cache.head_dim)), check("out", out_THD, (T, H, D))
        tables = check("block_tables", block_tables_SB, (S, B), I32)
        index, positions = (
            check("seq_index", seq_index_T, (T,), I32),
            check("positions", positions_T, (T,), I32),
        )
        heads = -(-H // J)
        tile = max(1, min(TILE_ROWS // heads, -(-T * J // (4 * self.threads))))
        area = (tile * heads * (4 * (D + Dp + 1 + B * bs) + 8) + 192) // 64 * 64
        scratch = self._scratch(area * self.threads)
        row = [q, T, index, positions, H, J, D, Dp, bs, int(cache.k.dtype == np.float16)]
        row += [
            address(cache.k),
            address(cache.v),
            out,
            tables,
            B,
            S,
            float_bits(scale),
            tile,
            address(scratch),
            area,
        ]
        row += [self._leaves[f"plain_{cache.k.dtype.name}"]]
        row += [0 if slopes_H is None else check("slopes", slopes_H, (H,)), cache.stride]
        keep = (q_THD, cache, block_tables_SB, seq_index_T, positions_T, out_THD, scratch, slopes_H)
        self._emit("paged_attention", row, *keep, workers=min(self.threads, -(-T // tile) * J))

    def take_rows(self, x_TE: Array, rows_S: Array, out_SE: Array) -> None:
        (T, E), S = columns("x", x_TE), columns("rows", rows_S, 1)[0]
        x, rows, out = (
            check("x", x_TE, (T, E)),
            check("rows", rows_S, (S,), I32),
            check("out", out_SE, (S, E)),
        )
        self._emit("take_rows", [x, rows, S, E, out], x_TE, rows_S, out_SE)

    def sample(
        self,
        logits_SV: Array,
        batch: SamplingBatch,
        ids_S: Array,
        logprobs_S: Array | None,
        top_ids_SN: Array | None = None,
        top_logprobs_SN: Array | None = None,
    ) -> None:
        S, V = columns("logits", logits_SV)
        N = 0 if top_ids_SN is None else min(columns("top_ids", top_ids_SN)[1], V)
        tops = [0, 0]
        if top_ids_SN is not None and top_logprobs_SN is not None:
            tops = [check("top_ids", top_ids_SN, (S, N), I32), check("top_logprobs", top_logprobs_SN, (S, N))]
        area = (V * 12 + V // 16 + 2048 * 16 + 256) // 64 * 64
        scratch = self._scratch(area * self.threads)
        row = [check("logits", logits_SV, (S, V)), S, V, *sampling_fields(batch, S)]
        row += [check("ids", ids_S, (S,), I32), *tops, N]
        row += [0 if logprobs_S is None else check("logprobs", logprobs_S, (S,)), address(scratch), area]
        keep = (logits_SV, batch, ids_S, logprobs_S, top_ids_SN, top_logprobs_SN, scratch)
        self._emit("sample", row, *keep, workers=max(1, min(self.threads, S)))

    def _collective(self, op: str, group: Group, array: Array | None, extra: list[int], *keep: Any) -> None:
        row = [address(array), address(group.buffer), 0, group.rank, group.size, group.slot_bytes]
        row += [int(group.timeout * 1e9), int(time.CLOCK_MONOTONIC), *extra]
        self._emit(op, row, array, *keep, group)

    def all_reduce(self, group: Group, x: Array) -> None:
        check("x", x, x.shape)
        self._collective("all_reduce", group, x, [x.size])

    def all_gather_cols(self, group: Group, x_SN: Array, out_SN: Array, widths: tuple[int, ...]) -> None:
        if len(widths) != group.size:
            raise ShapeError(f"{group.size} widths expected, got {len(widths)}")
        S = columns("x", x_SN)[0]
        check("x", x_SN, (S, widths[group.rank]))
        out = check("out", out_SN, (S, sum(widths)))
        table = np.array(widths, np.int64)
        self._collective("all_gather_cols", group, x_SN, [S, out, sum(widths), address(table)], out_SN, table)

    def broadcast(self, group: Group, x: Array, root: int = 0) -> None:
        check("x", x, x.shape, x.dtype)
        self._collective("broadcast", group, x, [x.nbytes, root])

    def barrier(self, group: Group) -> None:
        self._collective("barrier", group, None, [])


def warm(threads: int) -> None:
    """Compile the kernels, or load them from the cache; compiling takes half a minute, once per machine and version."""
    load_kernels(threads)
