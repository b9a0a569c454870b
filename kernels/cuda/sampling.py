"""Sampling on a GPU. Shape legend: S rows, V vocabulary, P slices of it, N reported log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.backend import SamplingBatch
from flm.kernels.cuda.check import Array, check, dimensions
from flm.kernels.cuda.kernel import Device, Kernel, instance
from flm.kernels.errors import ShapeError

THREADS = 512
SLICE = 8 * THREADS  # tokens of a block
MOST_SLICES = 256
STEPS = 1024  # of likelihood
ROOM = 10240  # tokens that pick() holds
ALIGNMENT = 16  # bytes, of what is copied together
FLOATS = ("temperature_S", "top_p_S", "min_p_S", "repetition_S", "presence_S", "frequency_S")


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """A SamplingBatch on the device: params float32 [S, 8] holds its six floats of each row, the rest is as it is there.
    What the host knows of all rows: whether some have penalties, are drawn, have a top_k or top_p."""

    params_S8: Array
    top_k_S: Array
    seed_S: Array
    position_S: Array
    row_ptr: Array
    token_ids: Array
    in_prompt: Array
    output_count: Array
    penalised: bool
    drawn: bool
    filtered: bool


def upload(device: Device, batch: SamplingBatch) -> DeviceBatch:
    """The batch on the device, by one copy. Raises ShapeError where its arrays disagree."""
    S, counted = len(batch.temperature_S), int(batch.row_ptr[-1])
    params = np.zeros((S, 8), np.float32)
    for column, name in enumerate(FLOATS):
        values = getattr(batch, name)
        if values.shape != (S,):
            raise ShapeError(f"{name}: {(S,)} expected, got {values.shape}")
        params[:, column] = values
    arrays = [params]
    for name, dtype, length in (
        ("top_k_S", np.int32, S), ("seed_S", np.uint64, S), ("position_S", np.int64, S), ("row_ptr", np.int32, S + 1),
        ("token_ids", np.int32, counted), ("in_prompt", np.uint8, counted), ("output_count", np.int32, counted),
    ):  # fmt: skip
        values = getattr(batch, name)
        if values.shape != (length,):
            raise ShapeError(f"{name}: {(length,)} expected, got {values.shape}")
        arrays.append(np.ascontiguousarray(values, dtype))
    drawn = batch.temperature_S > 0
    filtered = drawn & ((batch.top_k_S > 0) | (batch.top_p_S < 1))
    known = {"penalised": counted > 0, "drawn": bool(drawn.any()), "filtered": bool(filtered.any())}
    return DeviceBatch(*_together(device, arrays), **known)


def _together(device: Device, arrays: Sequence[NDArray[Any]]) -> list[Array]:
    """The arrays on the device: eight copies of few bytes would take longer than the kernels that read them."""
    ends = list(accumulate(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays))
    starts = [0, *ends[:-1]]
    whole = np.empty(ends[-1], np.uint8)
    for start, array in zip(starts, arrays, strict=True):
        whole[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    there = device.asarray(whole)
    return [
        there[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]


class SamplingSpace:
    """What blocks of a row leave for each other, for up to `rows` rows of `vocabulary` tokens."""

    def __init__(self, device: Device, rows: int, vocabulary: int) -> None:
        """Raises ShapeError for a vocabulary of more than a million tokens."""
        P = -(-vocabulary // SLICE)
        if P > MOST_SLICES:
            raise ShapeError(
                f"a vocabulary of at most {MOST_SLICES * SLICE} tokens expected, got {vocabulary}"
            )
        self._device, self.rows, self.vocabulary, self.slices = device, rows, vocabulary, P
        self.best, self.masses = device.empty((rows, P, 2), np.uint64), device.empty((rows, P), np.uint64)
        self.sums, self.found = device.empty((rows, P), np.float32), device.empty((rows, P), np.int32)
        self.facts = device.empty((rows, 4), np.uint64)
        self.done = device.asarray(np.zeros((rows, 3), np.int32))
        self.step_counts, self.step_masses = (device.empty((rows, STEPS), t) for t in (np.int32, np.uint64))
        self._made: dict[str, Array] = {}

    def tops(self, N: int) -> Array:
        """Of each slice's N best."""
        return self._once(f"tops {N}", (self.rows, self.slices, N), np.uint64)

    @property
    def adjusted(self) -> Array:
        """Logits less penalties."""
        return self._once("adjusted", (self.rows, self.vocabulary), np.float32)

    @property
    def places(self) -> Array:
        """Of tokens that filters may leave, in their slice."""
        return self._once("places", (self.rows, self.slices, SLICE), np.uint16)

    def _once(self, name: str, shape: tuple[int, ...], dtype: type) -> Array:
        if name not in self._made:
            self._made[name] = self._device.empty(shape, dtype)
        return self._made[name]


def kernels() -> tuple[Kernel, Kernel, Kernel, Kernel]:
    """Penalties, best tokens, weights, filters."""
    made = [instance("sampling.cu", name) for name in ("penalise", "scan", "weigh", "pick")]
    return made[0], made[1], made[2], made[3]


def sample(
    device: Device,
    logits_SV: Array,
    batch: DeviceBatch,
    ids_S: Array,
    logprobs_S: Array | None,
    space: SamplingSpace,
    top_ids_SN: Array | None = None,
    top_logprobs_SN: Array | None = None,
) -> None:
    """One id (int32) a row and its log-probability under the raw logits; top_*: the N most likely ids and theirs.

    logits, logprobs: float32. logprobs None: not computed; the N most likely need them. All on the device.
    """
    S, V = dimensions("logits", logits_SV, 2)
    N = 0 if top_ids_SN is None else dimensions("top_ids", top_ids_SN, 2)[1]
    check("logits", logits_SV, (S, V), "float32")
    check("params", batch.params_S8, (S, 8), "float32")
    check("ids", ids_S, (S,), "int32")
    if logprobs_S is not None:
        check("logprobs", logprobs_S, (S,), "float32")
    if space.rows < S or space.vocabulary != V or N > V or (N and logprobs_S is None):
        raise ShapeError(
            f"room for {S} rows of {V} tokens and at most so many log-probabilities beside those of the chosen expected, "
            f"got {space.rows} of {space.vocabulary} and {N}"
        )
    if N:
        check("top_ids", top_ids_SN, (S, N), "int32")
        check("top_logprobs", top_logprobs_SN, (S, N), "float32")
    if S:
        _launch(
            device, logits_SV, batch, [ids_S, logprobs_S], space, [top_ids_SN, top_logprobs_SN] if N else None
        )


def _launch(
    device: Device,
    logits_SV: Array,
    batch: DeviceBatch,
    chosen: list[Array | None],
    space: SamplingSpace,
    top: list[Array] | None,
) -> None:
    S, V = logits_SV.shape
    N = top[0].shape[1] if top else 0
    penalise, scan, weigh, pick = kernels()
    grid = space.slices, S
    rows = [logits_SV, space.adjusted if batch.penalised else None, batch.params_S8, batch.row_ptr]
    if batch.penalised:
        counted = [batch.token_ids, batch.in_prompt, batch.output_count]
        device.launch(penalise, grid, THREADS, [*rows, *counted, V])
    room = [space.best, space.sums, space.tops(N) if N else None, space.facts, space.done]
    args = [*rows, *chosen, *(top or (None, None)), *room, space.step_counts, space.step_masses, V, N]
    device.launch(scan, grid, THREADS, args)
    draws = [*rows, batch.top_k_S, batch.seed_S, batch.position_S, *chosen, space.facts, space.done]
    if batch.drawn:
        args = [*draws, space.masses, space.step_counts, space.step_masses, V]
        device.launch(weigh, grid, THREADS, args)
    if batch.filtered:
        device.launch(pick, grid, THREADS, [*draws, space.found, space.places, V], 8 * ROOM)
