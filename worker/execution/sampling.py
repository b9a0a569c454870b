"""From the requests' sampling parameters to the flat arrays that `Backend.sample` takes.

S rows of the step that draw a token. Rows live as long as a rank knows the sequence, so that the occurrences which
penalties need are counted once and then kept up to date, and only for sequences that have penalties.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flm.kernels.backend import SamplingBatch
from flm.worker.request import SamplingParams

MIN_TEMPERATURE = 1e-5  # below, the most likely token has all of the probability in float32
Ids = Sequence[int] | NDArray[np.int32]


class TokenCounts:
    """Distinct tokens of one sequence: whether they are in the prompt, and how often they are in the output."""

    def __init__(self, prompt_ids: Ids, output_ids: Ids) -> None:
        distinct = np.unique(np.asarray(prompt_ids, np.int32))
        self._size = len(distinct)
        capacity = max(64, 2 * self._size)
        self._ids = np.zeros(capacity, np.int32)
        self._in_prompt = np.zeros(capacity, np.uint8)
        self._output_count = np.zeros(capacity, np.int32)
        self._ids[: self._size] = distinct
        self._in_prompt[: self._size] = 1
        self._place = {token: i for i, token in enumerate(distinct.tolist())}
        self.add(output_ids)

    def add(self, output_ids: Ids) -> None:
        """Count further output tokens."""
        for token in map(int, output_ids):
            place = self._place.get(token)
            if place is None:
                place = self._place[token] = self._size
                if place == len(self._ids):
                    self._enlarge()
                self._ids[place] = token
                self._size += 1
            self._output_count[place] += 1

    def _enlarge(self) -> None:
        room = len(self._ids)
        self._ids = np.pad(self._ids, (0, room))
        self._in_prompt = np.pad(self._in_prompt, (0, room))
        self._output_count = np.pad(self._output_count, (0, room))

    def __len__(self) -> int:
        return self._size

    @property
    def ids(self) -> NDArray[np.int32]:
        return self._ids[: self._size]

    @property
    def in_prompt(self) -> NDArray[np.uint8]:
        return self._in_prompt[: self._size]

    @property
    def output_count(self) -> NDArray[np.int32]:
        return self._output_count[: self._size]


class SamplingRow:
    """What sampling has to know of one sequence. `token_ids` are all its tokens so far, of which the first
    `num_prompt` are the prompt's; call append() with every token that follows."""

    def __init__(self, params: SamplingParams, token_ids: Ids, num_prompt: int) -> None:
        self.params = params
        self.position = len(token_ids)  # index of the token to be drawn: the counter of its random number
        self.floats = (
            params.temperature if params.temperature >= MIN_TEMPERATURE else 0.0,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        # the most likely token and nothing else: no random number, history or log-probability is needed
        penalised = self.floats[3:] != (1, 0, 0)
        self.plain_greedy = self.floats[0] == 0 and not penalised and params.logprobs is None
        self.counts: TokenCounts | None = None
        if penalised:
            self.counts = TokenCounts(token_ids[:num_prompt], token_ids[num_prompt:])

    def append(self, token_ids: Ids) -> None:
        """Tokens drawn for this sequence since."""
        self.position += len(token_ids)
        if self.counts is not None:
            self.counts.add(token_ids)


def build_batch(rows: Sequence[SamplingRow]) -> SamplingBatch:
    """Row s of the batch is rows[s]. All arrays are new ones, so the rows may go on meanwhile."""
    floats = np.array([row.floats for row in rows], np.float32).reshape(len(rows), 6)
    temperature, top_p, min_p, repetition, presence, frequency = np.ascontiguousarray(floats.T)
    row_ptr = np.zeros(len(rows) + 1, np.int32)
    token_ids, in_prompt, output_count = np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.int32)
    counted = [row.counts for row in rows if row.counts is not None]
    if counted:
        np.cumsum([0 if row.counts is None else len(row.counts) for row in rows], out=row_ptr[1:])
        token_ids = np.concatenate([counts.ids for counts in counted])
        in_prompt = np.concatenate([counts.in_prompt for counts in counted])
        output_count = np.concatenate([counts.output_count for counts in counted])
    return SamplingBatch(
        temperature_S=temperature,
        top_k_S=np.array([row.params.top_k for row in rows], np.int32),
        top_p_S=top_p,
        min_p_S=min_p,
        repetition_S=repetition,
        presence_S=presence,
        frequency_S=frequency,
        seed_S=np.array([row.params.seed for row in rows], np.uint64),
        position_S=np.array([row.position for row in rows], np.int64),
        row_ptr=row_ptr,
        token_ids=token_ids,
        in_prompt=in_prompt,
        output_count=output_count,
    )
