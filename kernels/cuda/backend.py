"""CudaBackend: the Backend protocol on a GPU. Shape legend: see flm.kernels.backend.

Activations are float16 or bfloat16, `activation`; the residual stream and logits are float32. Index arrays and sampling's
results may be the host's own (NumPy): what they hold is moved when ops run, in graphs at every replay.

Every op gives a token the same bits whatever else is in the step, and decode the same as prefill; but for products of many
rows where `library` takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.backend import HeadNorm, SamplingBatch
from flm.kernels.cuda import attention, elementwise, linear, rope, sampling
from flm.kernels.cuda.adapters import AdapterCalls
from flm.kernels.cuda.attention import AttentionSpace
from flm.kernels.cuda.classic import ClassicCalls
from flm.kernels.cuda.experts import ExpertCalls
from flm.kernels.cuda.graph import CudaGraph, GraphDevice, Mirrors, on_host
from flm.kernels.cuda.latent import LatentCalls, LatentSpace
from flm.kernels.cuda.library_products import LibraryProducts
from flm.kernels.cuda.pack import CudaMatrix, pack
from flm.kernels.cuda.recurrent import RecurrentCalls
from flm.kernels.cuda.rope import CudaCache
from flm.kernels.cuda.step_calls import ACTIVATION
from flm.kernels.errors import DTypeError, KernelError
from flm.kernels.quant import QuantizedMatrix
from flm.kernels.stored import StoredMatrix

Array = Any


class CudaBackend(AdapterCalls, ClassicCalls, ExpertCalls, LatentCalls, RecurrentCalls):
    """One GPU's ops. activation: "float16" or "bfloat16". library: what takes products of many rows, if anything."""

    asynchronous = True

    def __init__(
        self, device: GraphDevice, activation: str = ACTIVATION, library: LibraryProducts | None = None
    ) -> None:
        if activation not in ("float16", "bfloat16"):
            raise DTypeError(f"float16 or bfloat16 activations expected, got {activation}")
        self.device, self.activation, self.library = device, activation, library
        self._mirrors = Mirrors(device)
        self._graph: CudaGraph | None = None
        self._spaces: dict[tuple[int, int, int], AttentionSpace] = {}
        self._sampling: dict[int, sampling.SamplingSpace] = {}  # by vocabulary
        self._scratch: dict[tuple[str, tuple[int, ...]], Array] = {}
        self._areas: dict[tuple[str, str], Array] = {}
        self._latent_spaces: dict[tuple[int, int, int], LatentSpace] = {}

    def empty(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        return self.device.empty(shape, dtype)

    def asarray(self, host: NDArray[Any]) -> Array:
        return self.device.asarray(host)

    def to_host(self, array: Array) -> NDArray[Any]:
        return self.device.download(array)

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[NDArray[Any]]]:
        return self.device.fetch(arrays)

    def pack(self, matrix: QuantizedMatrix | StoredMatrix) -> CudaMatrix:
        return pack(matrix, self.activation, self.device)

    def kv_caches(
        self,
        layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: Any = np.float32,
    ) -> list[CudaCache]:
        """float32 stands for the activations' type, which keys and values have; int8 halves it."""
        kind = (
            self.activation
            if dtype == np.float32
            else dtype
            if isinstance(dtype, str)
            else np.dtype(dtype).name
        )
        make = partial(rope.kv_cache, self.device, num_blocks, block_size, kv_heads, head_dim, kind)
        return [make() for _ in range(layers)]

    @contextmanager
    def capture(self) -> Iterator[CudaGraph]:
        if self._graph is not None:
            raise KernelError("capture() inside capture()")
        self._graph = graph = CudaGraph(self.device)
        try:
            yield graph
        finally:
            self._graph = None

    def _room(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """A buffer that ops of this name share, for as many rows; kept in sizes of powers of two, for graphs use them."""
        rows = 1 << max(shape[0] - 1, 0).bit_length()
        key = name, (rows, *shape[1:])
        if key not in self._scratch:
            self._scratch[key] = self.device.empty(key[1], dtype)
        return self._scratch[key][: shape[0]]

    def linear(
        self,
        x_TK: Array,
        weight: CudaMatrix,
        out_TN: Array,
        bias_N: Array | None = None,
        accumulate: bool = False,
    ) -> None:
        if weight.gather is None:
            return self.in_order(lambda: self._product(x_TK, weight, out_TN, bias_N, accumulate))
        gathered_TC = self._room("gathered", (len(x_TK), weight.columns), self.activation)
        self.in_order(lambda: linear.take_columns(self.device, x_TK, weight.gather, gathered_TC))
        self.in_order(lambda: self._product(gathered_TC, weight, out_TN, bias_N, accumulate))

    def _product(
        self, x_TK: Array, weight: CudaMatrix, out_TN: Array, bias_N: Array | None, accumulate: bool
    ) -> None:
        library = self.library
        if library is None or not library.product(self.device, x_TK, weight, out_TN, bias_N, accumulate):
            linear.linear(self.device, x_TK, weight, out_TN, bias_N, accumulate)

    def prepare(self, steps: Callable[[], None], ranks: int, on_progress: Callable[[float], None]) -> None:
        library = self.library

        def all_steps() -> None:
            steps()
            if library is not None:  # what it takes of these steps, it may leave of others with fewer tokens
                self.library = None
                try:
                    steps()
                finally:
                    self.library = library

        super().prepare(all_steps, ranks, on_progress)

    def embedding(
        self, weight: CudaMatrix, ids_T: Array, out_TE: Array, first_row: int = 0, scale: float = 1.0
    ) -> None:
        ids = self._on_device(ids_T)
        self.in_order(lambda: linear.embedding(self.device, weight, ids, out_TE, first_row, scale))

    def rms_norm(self, x_TE: Array, weight_E: Array, eps: float, out_TE: Array) -> None:
        self.in_order(lambda: elementwise.rms_norm(self.device, x_TE, weight_E, eps, out_TE))

    def add_rms_norm(self, x_TE: Array, delta_TE: Array, weight_E: Array, eps: float, out_TE: Array) -> None:
        self.in_order(lambda: elementwise.rms_norm(self.device, x_TE, weight_E, eps, out_TE, delta_TE))

    def silu_mul(self, gate_up_T2F: Array, out_TF: Array) -> None:
        self.in_order(lambda: elementwise.silu_mul(self.device, gate_up_T2F, out_TF))

    def rope_kv_write(
        self,
        qkv_TC: Array,
        positions_T: Array,
        slots_T: Array,
        cos_PR: Array,
        sin_PR: Array,
        cache: CudaCache,
        q_out_THD: Array,
        head_norm: HeadNorm | None = None,
        q_scale_P: Array | None = None,
    ) -> None:
        positions, slots, cos, sin = map(self._on_device, (positions_T, slots_T, cos_PR, sin_PR))
        scale = None if q_scale_P is None else self._on_device(q_scale_P)
        self.in_order(
            lambda: rope.rope_kv_write(
                self.device, qkv_TC, positions, slots, cos, sin, cache, q_out_THD, head_norm, scale
            )
        )

    def paged_attention(
        self,
        q_THD: Array,
        cache: CudaCache,
        block_tables_SB: Array,
        seq_index_T: Array,
        positions_T: Array,
        scale: float,
        out_THD: Array,
        slopes_H: Array | None = None,
    ) -> None:
        tables, index, positions = map(self._on_device, (block_tables_SB, seq_index_T, positions_T))
        (S, B), (_, H, D) = block_tables_SB.shape, q_THD.shape
        key = B * cache.block_size, S * H, D
        if key not in self._spaces:
            self._spaces[key] = attention.attention_space(self.device, *key)
        space = self._spaces[key]
        self.in_order(
            lambda: attention.paged_attention(
                self.device, q_THD, cache, tables, index, positions, scale, out_THD, space, slopes_H
            )
        )

    def take_rows(self, x_TE: Array, rows_S: Array, out_SE: Array) -> None:
        rows = self._on_device(rows_S)
        self.in_order(lambda: elementwise.take_rows(self.device, x_TE, rows, out_SE))

    def sample(
        self,
        logits_SV: Array,
        batch: SamplingBatch,
        ids_S: Array,
        logprobs_S: Array | None,
        top_ids_SN: Array | None = None,
        top_logprobs_SN: Array | None = None,
    ) -> None:
        S, V = logits_SV.shape
        outputs = (ids_S, logprobs_S, top_ids_SN, top_logprobs_SN)
        ids, logprobs, top_ids, tops = (
            a if not on_host(a) else self._room(f"sampled{i}", a.shape, a.dtype)
            for i, a in enumerate(outputs)
        )
        if logprobs is None and top_ids is not None:
            logprobs = self._room("logprobs", (S,), np.float32)
        if V not in self._sampling or self._sampling[V].rows < S:
            self._sampling[V] = sampling.SamplingSpace(self.device, S, V)
        space, rows = self._sampling[V], sampling.upload(self.device, batch)
        self.in_order(
            lambda: sampling.sample(self.device, logits_SV, rows, ids, logprobs, space, top_ids, tops)
        )
        moved = [
            (a, host)
            for a, host in zip((ids, logprobs, top_ids, tops), outputs, strict=True)
            if on_host(host)
        ]
        if self._graph is not None:
            self._graph.outputs += moved
            return
        for array, host in moved:
            host[...] = self.device.download(array)
