"""What a load test says: time to first token, time between tokens, throughput. Pure; times in seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One finished request: when it was sent, and when each of its frames came with how many tokens. The other counts
    are those of the server's usage."""

    sent: float
    arrivals: tuple[tuple[float, int], ...]
    tokens: int
    prompt_tokens: int = 0
    restarts: int = 0

    @property
    def first_token(self) -> float:
        """Seconds to the first token; nan where none came."""
        return self.arrivals[0][0] - self.sent if self.arrivals else math.nan

    @property
    def gaps(self) -> list[float]:
        """Seconds per token after the first frame; tokens of one frame share the wait for it."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [(after - before) / count for (before, _), (after, count) in pairs for _ in range(count)]


@dataclass(frozen=True)
class Distribution:
    """Percentiles by nearest rank, in seconds; nan without samples."""

    p50: float
    p90: float
    p99: float
    mean: float


@dataclass(frozen=True)
class Report:
    """A load test's figures. `tokens_per_second` counts all completion tokens over the wall time of the test."""

    requests: int
    failed: int
    concurrency: int
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    restarts: int
    tokens_per_second: float
    requests_per_second: float
    time_to_first_token: Distribution
    inter_token_latency: Distribution


def distribution(values: Sequence[float]) -> Distribution:
    """Percentiles by the nearest-rank definition."""
    ordered = sorted(values)
    if not ordered:
        return Distribution(math.nan, math.nan, math.nan, math.nan)
    p50, p90, p99 = (ordered[max(math.ceil(p / 100 * len(ordered)) - 1, 0)] for p in (50, 90, 99))
    return Distribution(p50, p90, p99, sum(ordered) / len(ordered))


def summarize(samples: Sequence[Sample], failed: int, concurrency: int, seconds: float) -> Report:
    """The report of `samples`, finished within `seconds` of wall time."""
    tokens = sum(sample.tokens for sample in samples)
    return Report(
        requests=len(samples),
        failed=failed,
        concurrency=concurrency,
        seconds=seconds,
        prompt_tokens=sum(sample.prompt_tokens for sample in samples),
        completion_tokens=tokens,
        restarts=sum(sample.restarts for sample in samples),
        tokens_per_second=tokens / seconds if seconds else 0.0,
        requests_per_second=len(samples) / seconds if seconds else 0.0,
        time_to_first_token=distribution([s.first_token for s in samples if s.arrivals]),
        inter_token_latency=distribution([gap for sample in samples for gap in sample.gaps]),
    )
