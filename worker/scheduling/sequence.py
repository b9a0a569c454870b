"""Sequence: one request on its way through the leader. Ranks never see it."""

from __future__ import annotations

from dataclasses import dataclass

from flm.worker.plan import Sampled
from flm.worker.request import FinishReason, Request, Timings, TokenEvent, TokenLogprobs
from flm.worker.scheduling.blocks import BlockTable


@dataclass(slots=True, eq=False)
class Sequence:
    """A request, its tokens so far and its place in the KV cache. Times are the scheduler's `now`."""

    request: Request
    token_ids: list[int]  # prompt, resumed and generated tokens
    table: BlockTable
    precedence: tuple[int, int]  # (-priority, arrival number): smaller goes first, larger is preempted first
    arrived: float
    max_length: int  # prompt + output tokens at which it ends for good
    num_prompt: int
    uncut: int = 0  # leading tokens that must be computed in one step
    num_computed: int = 0  # leading tokens whose KV is in the cache, or will be after the steps under way
    num_sent: int = 0  # leading tokens that the ranks' hosts know
    in_flight: int = 0  # steps under way that compute for it
    assumed: int = 0  # tokens that they draw: behind token_ids, and not known yet
    num_cached: int = 0  # of the prompt, found in the prefix cache at its first start
    slot: int = -1  # -1: waiting
    started: float | None = None  # first step
    first_token: float | None = None

    @property
    def length(self) -> int:
        """Tokens that it has, or will have if the steps under way do not end it."""
        return len(self.token_ids) + self.assumed

    @property
    def num_remaining(self) -> int:
        """Tokens still to compute: 1 when decoding, more when prefilling."""
        return self.length - self.num_computed

    @property
    def outstanding(self) -> int:
        """Tokens still to compute until it ends at the latest."""
        return self.max_length - self.num_computed

    def timings(self, now: float) -> Timings:
        """Seconds spent in each phase until `now`."""
        started = now if self.started is None else self.started
        first_token = now if self.first_token is None else self.first_token
        return Timings(started - self.arrived, first_token - started, now - first_token)

    def append(self, sampled: Sampled, eos: frozenset[int], now: float) -> TokenEvent:
        """Take in a token that was drawn; what it adds to the stream, which it may end."""
        token, params = sampled.token_id, self.request.params
        if token < 0:
            return self.not_finite_event(self.timings(now))
        self.token_ids.append(token)
        timings = Timings()
        if self.first_token is None:
            self.first_token = now
            timings = self.timings(now)
        if token in params.stop_token_ids or (token in eos and not params.ignore_eos):
            return self.last_event(FinishReason.STOP, self.timings(now), stop_token_id=token)
        logprobs: tuple[TokenLogprobs, ...] = ()
        if params.logprobs is not None:
            logprobs = (TokenLogprobs(token, sampled.logprob, tuple(sampled.top)),)
        if len(self.token_ids) < self.max_length:
            return self.event((token,), logprobs, timings)
        return self.last_event(FinishReason.LENGTH, self.timings(now), (token,), logprobs)

    def event(
        self,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        timings: Timings = Timings(),  # noqa: B008
    ) -> TokenEvent:
        """What a step that does not end the sequence adds to its stream."""
        output = len(self.token_ids) - self.num_prompt
        return TokenEvent(
            self.request.request_id,
            token_ids,
            logprobs,
            prompt_tokens=self.num_prompt,
            cached_tokens=self.num_cached,
            completion_tokens=output,
            timings=timings,
        )

    def last_event(
        self,
        reason: FinishReason,
        timings: Timings,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        stop_token_id: int | None = None,
        error: str = "",
    ) -> TokenEvent:
        """The event that ends the stream. A stop token counts as output but is not in `token_ids`."""
        return TokenEvent(
            self.request.request_id,
            token_ids,
            logprobs,
            reason,
            stop_token_id,
            self.num_prompt,
            self.num_cached,
            len(self.token_ids) - self.num_prompt,
            timings,
            error,
        )

    def not_finite_event(self, timings: Timings) -> TokenEvent:
        """The end of a sequence of which no token can be drawn."""
        why = (
            f"computed logits that are not finite after {len(self.token_ids)} tokens, {self.num_prompt} of them the "
            "prompt's: its checkpoint is damaged, or values exceed what the dtype of its activations can hold"
        )
        return self.last_event(FinishReason.NOT_FINITE, timings, error=why)
