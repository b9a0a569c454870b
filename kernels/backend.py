"""Backend: the operations a model is made of. Model code takes one and never asks which it has.

Shape legend: T tokens of the step, S sequences or selected rows, E hidden, K inputs, N outputs, F feed-forward width,
C columns of fused q, k, v; H query heads, J key-value heads, D head width, R = half of the rotary width, P table
positions, V vocabulary, B blocks per table row.

Activations are float32 (or what `activation` says), C-contiguous, indices int32. Every op writes into outputs that the
caller made with `empty`, so that a sequence of ops can be captured once and replayed. Arrays are the backend's own kind (NumPy on CPUs, CuPy on GPUs).
Every op's result for one token depends on that token's row (and its cache) alone, bit for bit: not on how many other
tokens share the step, nor on how a prompt was cut into chunks.

A backend object serves one thread at a time. Wrong shapes raise ShapeError, wrong dtypes DTypeError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flm.kernels.group import Group
from flm.kernels.quant import QuantizedMatrix
from flm.kernels.staging import DeviceMemory, Staged
from flm.kernels.stored import StoredMatrix

Array = Any


class PackedMatrix(Protocol):
    """A weight in the layout one backend streams fastest."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def nbytes(self) -> int: ...
    def dequantize(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop as float32 [stop - start, K], for tests."""
        ...


class KVCache(Protocol):
    """Keys and values of one layer, in blocks of `block_size` token slots. slot = block * block_size + offset."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm over each head's D columns: weights of q and of k, on the device."""

    q_D: Array
    k_D: Array
    eps: float


class Graph(Protocol):
    """Recorded ops. It keeps every array it uses alive; change their contents between replays, never their place."""

    def replay(self) -> None: ...


@dataclass(frozen=True)
class SamplingBatch:
    """Parameters of S rows, host arrays. Filters apply in the order penalties, temperature, min_p, top_k, top_p.

    temperature_S  float32, 0: greedy, the lowest id wins ties
    top_k_S        int32, 0: off;  of equal logits at the border the lowest ids stay
    top_p_S        float32, 1: off; the fewest most likely tokens whose probability reaches top_p (at least one)
    min_p_S        float32, 0: off; keeps probabilities >= min_p * the largest
    repetition_S   float32, 1: off; logits of tokens seen in prompt or output: / r if positive, * r if negative
    presence_S, frequency_S  float32, 0: off; subtracted once, or per occurrence, for tokens of the output
    seed_S         uint64, position_S int64: key and counter of the random number, so one draw per (seed, position)
    row_ptr        int32 [S + 1]: row s counts tokens row_ptr[s]..row_ptr[s + 1] of the three arrays below (distinct ids)
    token_ids int32, in_prompt uint8 (1: occurs in the prompt), output_count int32 (occurrences in the output)
    """

    temperature_S: NDArray[np.float32]
    top_k_S: NDArray[np.int32]
    top_p_S: NDArray[np.float32]
    min_p_S: NDArray[np.float32]
    repetition_S: NDArray[np.float32]
    presence_S: NDArray[np.float32]
    frequency_S: NDArray[np.float32]
    seed_S: NDArray[np.uint64]
    position_S: NDArray[np.int64]
    row_ptr: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    in_prompt: NDArray[np.uint8]
    output_count: NDArray[np.int32]

    @classmethod
    def greedy(cls, rows: int) -> SamplingBatch:
        """Every filter off and temperature 0."""
        zeros, ones = np.zeros(rows, np.float32), np.ones(rows, np.float32)
        return cls(
            zeros, np.zeros(rows, np.int32), ones, zeros, ones, zeros, zeros, np.zeros(rows, np.uint64),
            np.zeros(rows, np.int64), np.zeros(rows + 1, np.int32), np.zeros(0, np.int32), np.zeros(0, np.uint8),
            np.zeros(0, np.int32),
        )  # fmt: skip

    @classmethod
    def drawing(cls, rows: int) -> SamplingBatch:
        """Temperature 1, every filter on, none of which removes much, and a penalty for token 0."""
        ones, few = np.ones(rows, np.float32), np.full(rows, 0.01, np.float32)
        top_k, counts = np.full(rows, 50, np.int32), np.arange(rows + 1, dtype=np.int32)
        batch = replace(cls.greedy(rows), temperature_S=ones, top_k_S=top_k, top_p_S=1 - few, min_p_S=few)
        tokens, seen = np.zeros(rows, np.int32), np.ones(rows, np.uint8)
        return replace(
            batch, presence_S=few, row_ptr=counts, token_ids=tokens, in_prompt=seen, output_count=tokens + 1
        )


class Backend(Protocol):
    """See the module's docstring for what holds for every op."""

    @property
    def activation(self) -> Any:
        """The dtype of activations between ops. The residual stream, logits and all other floats are float32."""
        ...

    @property
    def kv_dtypes(self) -> tuple[str, ...]:
        """The dtypes' names that its caches can have, the usual one first."""
        ...

    @property
    def asynchronous(self) -> bool:
        """Whether ops are carried out beside the host, which goes on at once."""
        ...

    def decode_sizes(self, most: int) -> tuple[int, ...]:
        """For up to `most` tokens: the sizes that captured decode steps should have, ascending, smaller steps to be padded
        to the next, all captured before the first step. Empty where a step of any size is best captured when it comes."""
        ...

    def memory(self) -> DeviceMemory | None:
        """The device's own memory as it is now; None where it computes in the host's."""
        ...

    def prepare(self, steps: Callable[[], None], ranks: int, on_progress: Callable[[float], None]) -> None:
        """Compile what `steps`, which makes this backend's calls, launches, and what `ranks` ranks need to meet, without
        running it. on_progress gets 0 to 1. Does nothing where nothing is compiled for the machine it runs on."""
        ...

    def staged(self, arrays: Mapping[str, NDArray[Any]], table: NDArray[np.int32]) -> Staged:
        """The device's side of arrays that the host fills before every step."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """An array with arbitrary contents."""
        ...

    def asarray(self, host: NDArray[Any]) -> Array:
        """A copy of a host array (on CPUs perhaps the same array)."""
        ...

    def to_host(self, array: Array) -> NDArray[Any]:
        """The array on the host, after all ops before have finished."""
        ...

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[NDArray[Any]]]:
        """Begin to copy arrays to the host, in order with ops: later ones may overwrite them. What is returned waits until
        all ops before have finished, and gives the copies."""
        ...

    def pack(self, matrix: QuantizedMatrix | StoredMatrix) -> PackedMatrix:
        """A weight in this backend's layout; a stored one is read by rows, in threads. Not recorded by capture()."""
        ...

    def kv_caches(
        self, layers: int, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: Any = ...
    ) -> Sequence[KVCache]:
        """A zeroed cache for each layer, of one of kv_dtypes. block_size must be a multiple of 16."""
        ...

    def linear(
        self,
        x_TK: Array,
        weight: PackedMatrix,
        out_TN: Array,
        bias_N: Array | None = None,
        accumulate: bool = False,
    ) -> None:
        """out = x @ weight.T (+ bias), or out += that where accumulate. out must not overlap x."""
        ...

    def embedding(
        self, weight: PackedMatrix, ids_T: Array, out_TE: Array, first_row: int = 0, scale: float = 1.0
    ) -> None:
        """out[t] = scale * weight[ids[t] - first_row]; zeros where that is outside of 0..N, so vocabulary shards add up."""
        ...

    def rms_norm(self, x_TE: Array, weight_E: Array, eps: float, out_TE: Array) -> None:
        """out = x / sqrt(mean(x²) + eps) * weight. out may be x."""
        ...

    def add_rms_norm(self, x_TE: Array, delta_TE: Array, weight_E: Array, eps: float, out_TE: Array) -> None:
        """x += delta, in place; then out = rms_norm(x)."""
        ...

    def silu_mul(self, gate_up_T2F: Array, out_TF: Array) -> None:
        """out = silu(gate) * up with gate the first F columns and up the last F."""
        ...

    def rope_kv_write(
        self,
        qkv_TC: Array,
        positions_T: Array,
        slots_T: Array,
        cos_PR: Array,
        sin_PR: Array,
        cache: KVCache,
        q_out_THD: Array,
        head_norm: HeadNorm | None = None,
        q_scale_P: Array | None = None,
    ) -> None:
        """Rotate q and k (halves: column d pairs with d + R; columns from 2R on stay), store k and v, put q in q_out.

        C = (H + 2J) * D, columns q then k then v; J and D are the cache's, H is q_out's. slots -1: nothing stored.
        head_norm: every head of q and k is normed before. q_scale: q is multiplied by q_scale[position] after.
        """
        ...

    def paged_attention(
        self,
        q_THD: Array,
        cache: KVCache,
        block_tables_SB: Array,
        seq_index_T: Array,
        positions_T: Array,
        scale: float,
        out_THD: Array,
        slopes_H: Array | None = None,
    ) -> None:
        """Token t of sequence seq_index[t] attends to that sequence's cached positions 0..positions[t], inclusive.

        Query head h reads key-value head floor(h * J / H). Serves decode, chunked prefill and mixtures.
        seq_index -1: a padding token, out is zero. slopes (ALiBi, arXiv:2108.12409): scores of head h get
        slopes[h] * (position - positions[t]) added after they are scaled.
        """
        ...

    def take_rows(self, x_TE: Array, rows_S: Array, out_SE: Array) -> None:
        """out[s] = x[rows[s]]."""
        ...

    def sample(
        self,
        logits_SV: Array,
        batch: SamplingBatch,
        ids_S: Array,
        logprobs_S: Array | None,
        top_ids_SN: Array | None = None,
        top_logprobs_SN: Array | None = None,
    ) -> None:
        """Choose one id (int32) a row; logprobs (float32) are log_softmax of the raw logits, before any penalty; None
        where nobody asks for them, which saves a sweep over the vocabulary.

        top_*: the N most likely ids under the raw logits, best first, lowest id first among equals.
        Each row is a pure function of (its logits, its parameters, seed, position). The id is -1, and the log-probability
        NaN, where a logit is NaN or the largest, penalties applied, is infinite.
        """
        ...

    def all_reduce(self, group: Group, x: Array) -> None:
        """x = the sum over ranks, added in rank order: the same bits on every rank."""
        ...

    def all_gather_cols(self, group: Group, x_SN: Array, out_SN: Array, widths: tuple[int, ...]) -> None:
        """Concatenate by columns; rank r contributes widths[r] columns. float32."""
        ...

    def broadcast(self, group: Group, x: Array, root: int = 0) -> None:
        """x = root's x. Any dtype of 4 or 8 bytes."""
        ...

    def barrier(self, group: Group) -> None:
        """Return once every rank has called it."""
        ...

    def capture(self) -> AbstractContextManager[Graph]:
        """Inside `with backend.capture() as graph`, ops are recorded and not run; graph.replay() runs them all."""
        ...
