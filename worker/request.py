"""Requests, sequences and what comes back of them.

A `Request` is enough to replay: (weights, prompt, params, seed) determine every token, so a stream
that lost its replica goes on elsewhere by sending the same request with the tokens so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from flm.worker.errors import InvalidRequest

MAX_LOGPROBS = 20


class FinishReason(Enum):
    STOP = "stop"  # an end-of-sequence or stop token, or a stop string
    LENGTH = "length"  # max_tokens or the context is used up
    CANCELLED = "cancelled"
    ERROR = "error"  # the replica failed; the gateway resumes the request elsewhere
    NOT_FINITE = "not_finite"  # the logits were not; they would be the same elsewhere


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Defaults are neutral: plain sampling from the model.

    temperature 0 is greedy, and so is all below 1e-5, where float32 logits cannot be divided. top_k 0, top_p 1 and min_p 0 switch these filters off. Penalties are those of
    the OpenAI API (presence, frequency) and of CTRL, arXiv:1909.05858 (repetition). `logprobs` None: none;
    k: the chosen token's and those of the k most likely tokens. `adapter`: the name of the adapter that the model runs with,
    empty for none.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    adapter: str = ""

    def __post_init__(self) -> None:
        for name, low, high, closed in _RANGES:
            value = getattr(self, name)
            if not math.isfinite(value) or value < low or value > high or (value == low and not closed):
                raise InvalidRequest(name, f"expected {'[' if closed else '('}{low}, {high}], got {value}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InvalidRequest("logprobs", f"expected 0 to {MAX_LOGPROBS}, got {self.logprobs}")
        if not 0 <= self.seed < 2**64:
            raise InvalidRequest("seed", f"expected an unsigned 64-bit integer, got {self.seed}")
        if any(not 0 <= t < 2**31 for t in self.stop_token_ids):
            raise InvalidRequest("stop_token_ids", f"expected token ids >= 0, got {self.stop_token_ids}")


# field, lowest, highest, is the lowest itself allowed
_RANGES = (
    ("max_tokens", 1, 2**31 - 1, True),
    ("temperature", 0.0, 100.0, True),
    ("top_k", 0, 2**31 - 1, True),
    ("top_p", 0.0, 1.0, False),
    ("min_p", 0.0, 1.0, True),
    ("repetition_penalty", 0.01, 100.0, True),
    ("presence_penalty", -100.0, 100.0, True),
    ("frequency_penalty", -100.0, 100.0, True),
)


@dataclass(frozen=True, slots=True)
class Request:
    """One generation, as it crosses the router. `resumed_ids` are tokens already generated on another
    replica: they are part of the context, count as output for penalties and max_tokens, and the next
    random number is the one of their successor's position."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    resumed_ids: tuple[int, ...] = ()
    priority: int = 0  # higher goes first
    cache_salt: str = ""  # requests share prefix-cache blocks only within one salt

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise InvalidRequest("prompt", "expected at least one token, got none")
        if len(self.resumed_ids) >= self.params.max_tokens:
            raise InvalidRequest("resumed_ids", f"{len(self.resumed_ids)} tokens already reach max_tokens")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """log p of one generated token under the raw (unpenalised, temperature 1) distribution, and the most
    likely alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent waiting for a first step, from there to the first token, and after it."""

    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step adds to one request's stream. The last event has a finish_reason; it may carry no
    token. `error` says why when finish_reason is ERROR or NOT_FINITE. The first and the last event have timings."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    timings: Timings = Timings()
    error: str = ""
