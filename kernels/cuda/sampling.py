"""Sampling on a GPU. Shape legend: S rows, V vocabulary, N reported log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flm.kernels.backend import SamplingBatch
from flm.kernels.cuda.check import Array, check, dimensions
from flm.kernels.cuda.kernel import Device, Kernel, instance
from flm.kernels.errors import ShapeError

THREADS = 1024
FLOATS = ("temperature_S", "top_p_S", "min_p_S", "repetition_S", "presence_S", "frequency_S")


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """A SamplingBatch on the device: params float32 [S, 8] holds its six floats of each row, the rest is as it is there."""

    params_S8: Array
    top_k_S: Array
    seed_S: Array
    position_S: Array
    row_ptr: Array
    token_ids: Array
    in_prompt: Array
    output_count: Array


def upload(device: Device, batch: SamplingBatch) -> DeviceBatch:
    """The batch on the device. Raises ShapeError where its arrays disagree."""
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
    return DeviceBatch(*(device.asarray(array) for array in arrays))


def kernel() -> Kernel:
    """The one instance."""
    return instance("sampling.cu", "sample")


def sample(
    device: Device,
    logits_SV: Array,
    batch: DeviceBatch,
    ids_S: Array,
    logprobs_S: Array,
    adjusted_SV: Array,
    top_ids_SN: Array | None = None,
    top_logprobs_SN: Array | None = None,
) -> None:
    """One id (int32) a row and its log-probability under the raw logits; top_*: the N most likely ids and theirs.

    logits, logprobs: float32. adjusted: float32 [S or more, V], for rows with penalties. All on the device.
    """
    S, V = dimensions("logits", logits_SV, 2)
    N = 0 if top_ids_SN is None else dimensions("top_ids", top_ids_SN, 2)[1]
    check("logits", logits_SV, (S, V), "float32")
    check("params", batch.params_S8, (S, 8), "float32")
    check("ids", ids_S, (S,), "int32")
    check("logprobs", logprobs_S, (S,), "float32")
    check("adjusted", adjusted_SV, (len(adjusted_SV), V), "float32")
    if len(adjusted_SV) < S or N > V:
        raise ShapeError(
            f"room for {S} adjusted rows and at most {V} tokens expected, got {len(adjusted_SV)} and {N}"
        )
    if N:
        check("top_ids", top_ids_SN, (S, N), "int32")
        check("top_logprobs", top_logprobs_SN, (S, N), "float32")
    if S:
        args = [logits_SV, adjusted_SV, batch.params_S8, batch.top_k_S, batch.seed_S, batch.position_S]
        args += [batch.row_ptr, batch.token_ids, batch.in_prompt, batch.output_count]
        args += [ids_S, logprobs_S, top_ids_SN, top_logprobs_SN, V, N]
        device.launch(kernel(), (S,), THREADS, args)
