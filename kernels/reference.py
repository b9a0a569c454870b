"""ReferenceBackend: every op in plain NumPy, as short as it can be said. The specification, and a slow backend.

Shape legend: see backend.py. Each op computes in the backend's dtype (float64 for tests) and rounds once on storing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.backend import HeadNorm, SamplingBatch
from flm.kernels.errors import ShapeError
from flm.kernels.group import Group
from flm.kernels.quant import QuantizedMatrix
from flm.kernels.reference_adapters import ReferenceAdapterOps
from flm.kernels.reference_classic import ReferenceClassicOps
from flm.kernels.reference_experts import ReferenceExpertOps
from flm.kernels.reference_latent import ReferenceLatentOps
from flm.kernels.reference_recurrent import ReferenceRecurrentOps
from flm.kernels.reference_sampling import sample_row, top_logprobs
from flm.kernels.staging import HostMemory
from flm.kernels.stored import StoredMatrix

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class ReferenceMatrix:
    """A weight [N, K], dequantised."""

    values: NDArray[np.float32]
    nbytes: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.values.shape[1])

    def dequantize(self, start: int, stop: int) -> NDArray[np.float32]:
        return self.values[start:stop]


@dataclass(frozen=True, eq=False)
class ReferenceCache:
    """Keys and values [slots, J, D]."""

    k: Array
    v: Array
    block_size: int

    @property
    def num_blocks(self) -> int:
        return len(self.k) // self.block_size

    @property
    def kv_heads(self) -> int:
        return int(self.k.shape[1])

    @property
    def head_dim(self) -> int:
        return int(self.k.shape[2])

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class ReferenceBackend(
    HostMemory,
    ReferenceAdapterOps,
    ReferenceClassicOps,
    ReferenceExpertOps,
    ReferenceLatentOps,
    ReferenceRecurrentOps,
):
    """The Backend protocol in NumPy. dtype: of the arithmetic, float32 or float64."""

    def empty(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        return np.empty(shape, dtype)

    def asarray(self, host: Array) -> Array:
        return np.ascontiguousarray(host)

    def to_host(self, array: Array) -> Array:
        return array

    def pack(self, matrix: QuantizedMatrix | StoredMatrix) -> ReferenceMatrix:
        matrix = StoredMatrix.of(matrix).whole()
        return ReferenceMatrix(matrix.dequantize(), matrix.nbytes)

    def kv_caches(
        self,
        layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: Any = np.float32,
    ) -> list[ReferenceCache]:
        if block_size % 16 or block_size <= 0:
            raise ShapeError(f"a block size that is a multiple of 16 expected, got {block_size}")
        shape = (num_blocks * block_size, kv_heads, head_dim)
        zeros = partial(np.zeros, shape, dtype)
        return [ReferenceCache(zeros(), zeros(), block_size) for _ in range(layers)]

    def linear(
        self,
        x_TK: Array,
        weight: ReferenceMatrix,
        out_TN: Array,
        bias_N: Array | None = None,
        accumulate: bool = False,
    ) -> None:
        def call() -> None:
            y_TN = x_TK.astype(self.dtype) @ weight.values.astype(self.dtype).T
            if bias_N is not None:
                y_TN = y_TN + bias_N
            out_TN[...] = out_TN + y_TN if accumulate else y_TN

        self._do(call)

    def embedding(
        self, weight: ReferenceMatrix, ids_T: Array, out_TE: Array, first_row: int = 0, scale: float = 1.0
    ) -> None:
        def call() -> None:
            rows = ids_T.astype(np.int64) - first_row
            inside = (rows >= 0) & (rows < weight.shape[0])
            out_TE[...] = np.where(inside[:, None], weight.values[np.where(inside, rows, 0)] * scale, 0)

        self._do(call)

    def _normed(self, x_TE: Array, weight_E: Array, eps: float) -> Array:
        wide = x_TE.astype(self.dtype)
        return wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + self.dtype.type(eps)) * weight_E

    def rms_norm(self, x_TE: Array, weight_E: Array, eps: float, out_TE: Array) -> None:
        def call() -> None:
            out_TE[...] = self._normed(x_TE, weight_E, eps)

        self._do(call)

    def add_rms_norm(self, x_TE: Array, delta_TE: Array, weight_E: Array, eps: float, out_TE: Array) -> None:
        def call() -> None:
            x_TE[...] = x_TE + delta_TE
            out_TE[...] = self._normed(x_TE, weight_E, eps)

        self._do(call)

    def silu_mul(self, gate_up_T2F: Array, out_TF: Array) -> None:
        def call() -> None:
            gate, up = np.split(gate_up_T2F.astype(self.dtype), 2, axis=1)
            out_TF[...] = gate / (1 + np.exp(np.minimum(-gate, 88))) * up

        self._do(call)

    def rope_kv_write(
        self,
        qkv_TC: Array,
        positions_T: Array,
        slots_T: Array,
        cos_PR: Array,
        sin_PR: Array,
        cache: ReferenceCache,
        q_out_THD: Array,
        head_norm: HeadNorm | None = None,
        q_scale_P: Array | None = None,
    ) -> None:
        def call() -> None:
            heads, kv, dim = q_out_THD.shape[1], cache.kv_heads, cache.head_dim
            half = cos_PR.shape[1]
            all_heads = qkv_TC.astype(self.dtype).reshape(len(qkv_TC), heads + 2 * kv, dim)
            if head_norm is not None:
                normed = (head_norm.q_D, head_norm.k_D)
                for part, weight_D in zip((slice(heads), slice(heads, heads + kv)), normed, strict=True):
                    all_heads[:, part] = self._normed(all_heads[:, part], weight_D, head_norm.eps)
            turned = all_heads[:, : heads + kv].copy()
            cos, sin = cos_PR[positions_T][:, None], sin_PR[positions_T][:, None]
            first, second = all_heads[:, : heads + kv, :half], all_heads[:, : heads + kv, half : 2 * half]
            turned[..., :half] = first * cos - second * sin
            turned[..., half : 2 * half] = second * cos + first * sin
            scale_T11 = 1 if q_scale_P is None else q_scale_P[positions_T][:, None, None]
            q_out_THD[...] = turned[:, :heads] * scale_T11
            stored = slots_T >= 0
            cache.k[slots_T[stored]] = turned[stored, heads:]
            cache.v[slots_T[stored]] = all_heads[stored, heads + kv :]

        self._do(call)

    def paged_attention(
        self,
        q_THD: Array,
        cache: ReferenceCache,
        block_tables_SB: Array,
        seq_index_T: Array,
        positions_T: Array,
        scale: float,
        out_THD: Array,
        slopes_H: Array | None = None,
    ) -> None:
        def call() -> None:
            heads = q_THD.shape[1]
            kv_of_head = np.arange(heads) * cache.kv_heads // heads
            offsets = np.arange(cache.block_size)
            for t, sequence in enumerate(seq_index_T):
                if sequence < 0:
                    out_THD[t] = 0
                    continue
                length = int(positions_T[t]) + 1
                blocks = block_tables_SB[sequence, : -(-length // cache.block_size)]
                slots = (blocks[:, None].astype(np.int64) * cache.block_size + offsets).reshape(-1)[:length]
                k_LHD = cache.k[slots][:, kv_of_head].astype(self.dtype)
                v_LHD = cache.v[slots][:, kv_of_head].astype(self.dtype)
                scores_HL = np.einsum("hd,lhd->hl", q_THD[t].astype(self.dtype), k_LHD) * self.dtype.type(
                    scale
                )
                if slopes_H is not None:
                    scores_HL += slopes_H[:, None] * (np.arange(length) - length + 1)
                weights_HL = np.exp(scores_HL - scores_HL.max(axis=1, keepdims=True))
                weights_HL /= weights_HL.sum(axis=1, keepdims=True)
                out_THD[t] = np.einsum("hl,lhd->hd", weights_HL, v_LHD)

        self._do(call)

    def take_rows(self, x_TE: Array, rows_S: Array, out_SE: Array) -> None:
        def call() -> None:
            out_SE[...] = x_TE[rows_S]

        self._do(call)

    def sample(
        self,
        logits_SV: Array,
        batch: SamplingBatch,
        ids_S: Array,
        logprobs_S: Array | None,
        top_ids_SN: Array | None = None,
        top_logprobs_SN: Array | None = None,
    ) -> None:
        def call() -> None:
            for s, logits in enumerate(logits_SV):
                ids_S[s], logprob = sample_row(logits, batch, s)
                if logprobs_S is not None:
                    logprobs_S[s] = logprob
                if top_ids_SN is not None and top_logprobs_SN is not None:
                    top_ids_SN[s], top_logprobs_SN[s] = top_logprobs(logits, top_ids_SN.shape[1])

        self._do(call)

    def all_reduce(self, group: Group, x: Array) -> None:
        def call() -> None:
            flat, step = x.reshape(-1), group.slot_bytes // x.itemsize
            for start in range(0, flat.size, step):
                piece = flat[start : start + step]
                epoch = group.exchange(piece)
                parts = [group.slot(r, epoch)[: piece.nbytes].view(x.dtype) for r in range(group.size)]
                total = parts[0].copy()
                for part in parts[1:]:
                    total += part
                piece[...] = total

        self._do(call)

    def all_gather_cols(self, group: Group, x_SN: Array, out_SN: Array, widths: tuple[int, ...]) -> None:
        def call() -> None:
            rows, step = len(x_SN), group.slot_bytes // x_SN.itemsize
            local = x_SN.reshape(-1)
            gathered = [np.empty(rows * w, x_SN.dtype) for w in widths]
            for start in range(0, rows * max(widths), step):
                epoch = group.exchange(local[start : start + step])
                for r, whole in enumerate(gathered):
                    piece = whole[start : start + step]
                    piece[...] = group.slot(r, epoch)[: piece.nbytes].view(x_SN.dtype)
            out_SN[...] = np.concatenate(
                [g.reshape(rows, w) for g, w in zip(gathered, widths, strict=True)], axis=1
            )

        self._do(call)

    def broadcast(self, group: Group, x: Array, root: int = 0) -> None:
        def call() -> None:
            flat, step = x.reshape(-1), group.slot_bytes // x.itemsize
            for start in range(0, flat.size, step):
                piece = flat[start : start + step]
                epoch = group.exchange(piece)
                piece[...] = group.slot(root, epoch)[: piece.nbytes].view(x.dtype)

        self._do(call)

    def barrier(self, group: Group) -> None:
        def call() -> None:
            group.exchange(np.zeros(0, np.uint8))

        self._do(call)
