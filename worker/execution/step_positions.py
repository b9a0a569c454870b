"""Positions of one step for models whose requests are not all alike: rotation by the length of the prompt, or in two
dimensions around a context that sees all of itself.

Shape legend: T tokens of the step, R half the rotary width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flm.worker.config import AttentionConfig, PrefixConfig
from flm.worker.layers.positions import logn_scales
from flm.worker.layers.rope import inverse_frequencies, turns


class StepPositions(Protocol):
    """Row t of every table belongs to token t of the step. The arrays stay the same from step to step."""

    cos_TR: NDArray[np.float32]
    sin_TR: NDArray[np.float32]
    q_scale_T: NDArray[np.float32] | None
    rows_T: NDArray[np.int32]
    last_visible_T: NDArray[np.int32] | None

    def request(self, prompt_ids: Sequence[int]) -> Any:
        """What write() needs to know of a request."""
        ...

    def write(self, at: int, positions_T: NDArray[np.int32], request: Any) -> None:
        """The rows of one request's tokens, from row `at` on."""
        ...


def step_positions(attention: AttentionConfig, max_tokens: int) -> StepPositions | None:
    """None where one table of rotations serves all requests."""
    if attention.prefix is not None:
        return PlanarPositions(attention, attention.prefix, max_tokens)
    return StretchedPositions(attention, max_tokens) if attention.rope.per_request else None


class _Tables:
    def __init__(self, attention: AttentionConfig, max_tokens: int) -> None:
        self.cos_TR = np.zeros((max_tokens, attention.rope.rotary_dim // 2), np.float32)
        self.sin_TR = np.zeros_like(self.cos_TR)
        self.q_scale_T = np.ones(max_tokens, np.float32) if attention.logn_length else None
        self.rows_T = np.arange(max_tokens, dtype=np.int32)
        self.last_visible_T: NDArray[np.int32] | None = None


class StretchedPositions(_Tables):
    """Every request rotates by frequencies that the length of its prompt decides (see RopeConfig.stretch)."""

    def __init__(self, attention: AttentionConfig, max_tokens: int) -> None:
        super().__init__(attention, max_tokens)
        self._rope, self._logn = attention.rope, attention.logn_length
        self._frequencies: dict[float, NDArray[np.float64]] = {}

    def request(self, prompt_ids: Sequence[int]) -> NDArray[np.float64]:
        """Its frequencies."""
        stretched = self._rope.stretch(len(prompt_ids))
        if len(self._frequencies) > 4096:
            self._frequencies.clear()
        return self._frequencies.setdefault(stretched, inverse_frequencies(self._rope, stretched))

    def write(self, at: int, positions_T: NDArray[np.int32], request: NDArray[np.float64]) -> None:
        rows = slice(at, at + len(positions_T))
        self.cos_TR[rows], self.sin_TR[rows] = turns(positions_T, request, self._rope.magnitude)
        if self.q_scale_T is not None:
            self.q_scale_T[rows] = logn_scales(self._logn, positions_T)


class PlanarPositions(_Tables):
    """ChatGLM-6B (github.com/THUDM/ChatGLM-6B): half of the rotary pairs turn by the position in the context, where tokens
    after it stand at its mask token, the others by the position after the context, counted from 1. Tokens of the context
    see all of it. The published code rounds frequencies to float16."""

    def __init__(self, attention: AttentionConfig, prefix: PrefixConfig, max_tokens: int) -> None:
        super().__init__(attention, max_tokens)
        self._prefix, pairs = prefix, attention.rope.rotary_dim // 4
        frequencies = attention.rope.theta ** -(np.arange(pairs, dtype=np.float64) / pairs)
        self._frequencies = frequencies.astype(np.float16).astype(np.float64)
        self._pairs = pairs
        self.last_visible_T = np.zeros(max_tokens, np.int32)

    def request(self, prompt_ids: Sequence[int]) -> tuple[int, int]:
        """The length of its context, and where the mask token stands in it."""
        return self._prefix.length(prompt_ids), self._prefix.mask_position(prompt_ids)

    def write(self, at: int, positions_T: NDArray[np.int32], request: tuple[int, int]) -> None:
        context, mask = request
        rows, inside = slice(at, at + len(positions_T)), positions_T < context
        first, second = slice(0, self._pairs), slice(self._pairs, None)
        along_T, after_T = (
            np.where(inside, positions_T, mask),
            np.where(inside, 0, positions_T - context + 1),
        )
        self.cos_TR[rows, first], self.sin_TR[rows, first] = turns(along_T, self._frequencies, 1.0)
        self.cos_TR[rows, second], self.sin_TR[rows, second] = turns(after_T, self._frequencies, 1.0)
        assert self.last_visible_T is not None
        self.last_visible_T[rows] = np.where(inside, context - 1, positions_T)
