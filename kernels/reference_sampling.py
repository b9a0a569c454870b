"""Sampling in plain NumPy: the specification of Backend.sample, one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.backend import SamplingBatch
from flm.kernels.philox import uniform

Array = NDArray[Any]


def log_softmax(logits_V: Array) -> NDArray[np.float64]:
    wide = logits_V.astype(np.float64)
    shifted = wide - wide.max()
    return shifted - np.log(np.exp(shifted).sum())


def top_logprobs(logits_V: Array, count: int) -> tuple[Array, Array]:
    """The `count` most likely ids, lowest id first among equals, and their log-probabilities."""
    order = np.argsort(-logits_V, kind="stable")[:count]
    return order, log_softmax(logits_V)[order]


def penalised(logits_V: Array, batch: SamplingBatch, s: int) -> NDArray[np.float32]:
    """Float32 as in the fast backends: filters and ties are decided on these values."""
    out = logits_V.astype(np.float32)
    row = slice(batch.row_ptr[s], batch.row_ptr[s + 1])
    ids, counts = batch.token_ids[row], batch.output_count[row]
    seen = (batch.in_prompt[row] != 0) | (counts > 0)
    values, r = out[ids], batch.repetition_S[s]
    values = np.where(seen, np.where(values > 0, values / r, values * r), values)
    values = values - batch.frequency_S[s] * counts.astype(np.float32)
    values = values - np.where(counts > 0, batch.presence_S[s], np.float32(0))
    out[ids] = values
    return out


def kept(logits_V: NDArray[np.float32], batch: SamplingBatch, s: int) -> tuple[Array, Array]:
    """Ids that pass min_p, top_k and top_p, ascending, with their unnormalised probabilities."""
    temperature, top_k = np.float32(batch.temperature_S[s]), int(batch.top_k_S[s])
    wide = logits_V.astype(np.float64)
    weights = np.exp((wide - wide.max()) / temperature)
    order = np.argsort(-logits_V, kind="stable")
    order = order[weights[order] >= batch.min_p_S[s]]
    if top_k > 0:
        order = order[:top_k]
    if batch.top_p_S[s] < 1:
        before = np.concatenate([[0.0], np.cumsum(weights[order])[:-1]])
        keep = before < np.float64(batch.top_p_S[s]) * weights[order].sum()
        keep[0] = True
        order = order[keep]
    ids = np.sort(order)
    return ids, weights[ids]


def sample_row(logits_V: Array, batch: SamplingBatch, s: int) -> tuple[int, float]:
    """The id of row s and its raw log-probability; -1 and NaN where no token can be drawn."""
    adjusted = penalised(logits_V, batch, s)
    if not np.isfinite(adjusted.max()):  # which is NaN where any is
        return -1, np.nan
    if batch.temperature_S[s] <= 0:
        chosen = int(np.argmax(adjusted))
    else:
        ids, weights = kept(adjusted, batch, s)
        target = uniform(int(batch.seed_S[s]), int(batch.position_S[s])) * weights.sum()
        at = np.searchsorted(np.cumsum(weights), target, side="right")
        chosen = int(ids[min(int(at), len(ids) - 1)])
    return chosen, float(log_softmax(logits_V)[chosen])
