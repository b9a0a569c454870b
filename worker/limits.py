"""What one replica accepts, and how busy it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from flm.worker.errors import AdapterNotFound, ConfigError, InvalidRequest
from flm.worker.request import Request

HANG_TIMEOUT = 10.0  # seconds in one step, unless a file says otherwise
_SMOOTHING = 0.2  # weight of the newest request in the average service time
_RETRY_AFTER = (0.05, 60.0)  # seconds, bounds of the advice given to refused clients


@dataclass(frozen=True)
class Limits:
    """Bounds of one replica. ConfigError where one is too small to serve anything."""

    max_sequences: int = 64  # running at once
    max_step_tokens: int = 512  # computed in one step, over all sequences
    max_queue: int = 256  # requests beyond those that can run at once
    max_context: int = 4096  # tokens, prompt and output together
    adapters: tuple[str, ...] = ()  # that requests may name

    def __post_init__(self) -> None:
        lowest = {"max_sequences": 1, "max_step_tokens": 1, "max_queue": 0, "max_context": 2}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ConfigError(f"expected at least {low}, got {getattr(self, name)}", field=name)

    def check(self, request: Request, vocab_size: int, context_limit: int) -> None:
        """InvalidRequest unless the request's ids are in the vocabulary, which has as many as it wants the
        log-probabilities of, and its context leaves room for at least one token; AdapterNotFound. `context_limit`:
        max_context, or less where the KV cache is smaller than that."""
        adapter, tops = request.params.adapter, request.params.logprobs or 0
        if adapter and adapter not in self.adapters:
            raise AdapterNotFound(adapter, self.adapters)
        if tops > vocab_size:
            raise InvalidRequest("logprobs", f"expected 0 to {vocab_size}, as the vocabulary has, got {tops}")
        prompt, resumed = request.prompt_ids, request.resumed_ids
        for field, ids in (("prompt", prompt), ("resumed_ids", resumed)):
            if ids and (min(ids) < 0 or max(ids) >= vocab_size):
                wrong = next(i for i in ids if not 0 <= i < vocab_size)
                raise InvalidRequest(field, f"expected token ids from 0 to {vocab_size - 1}, got {wrong}")
        length = len(prompt) + len(resumed)
        if length < context_limit:
            return
        given = f"{len(prompt)} prompt tokens" + (f" and {len(resumed)} resumed ones" if resumed else "")
        if length >= self.max_context:
            limit = f"a context of {self.max_context} tokens"
        else:
            limit = f"a KV cache of {context_limit} tokens"
        raise InvalidRequest("prompt", f"{given} leave no room for output in {limit}")


class PromptRules(Protocol):
    """What a model asks of the scheduler; ModelConfig is one."""

    def cache_key(self, prompt_ids: tuple[int, ...]) -> str:
        """Requests share cached blocks only where this is the same for their prompts."""
        ...

    @property
    def shares_prefixes(self) -> bool:
        """False: what was computed of a sequence serves no other, nor itself once it was preempted."""
        ...

    def uncut(self, prompt_ids: tuple[int, ...]) -> int:
        """Leading tokens that have to be computed in one step; a step must have room for them."""
        ...


class NoRules:
    """Prompts may be cut anywhere and share what they have in common."""

    shares_prefixes = True

    def cache_key(self, prompt_ids: tuple[int, ...]) -> str:
        return ""

    def uncut(self, prompt_ids: tuple[int, ...]) -> int:
        return 0


NO_RULES = NoRules()


class ServiceTime:
    """Smoothed seconds from a request's first step to its end."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        weight = _SMOOTHING if self._seconds else 1.0
        self._seconds += weight * (seconds - self._seconds)

    def until_one_ends(self, running: int) -> float:
        """Seconds until about one of `running` requests ends, by Little's law; 1 before anything is known."""
        low, high = _RETRY_AFTER
        return min(max(self._seconds / max(running, 1), low), high) if self._seconds else 1.0


@dataclass(frozen=True)
class Load:
    """How busy a replica is; the fields of the protocol's ReplicaLoad."""

    running: int = 0
    waiting: int = 0
    outstanding_tokens: int = 0  # still to compute, were every request to use all of its max_tokens
    blocks_total: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    tokens_generated: int = 0
    preemptions: int = 0
