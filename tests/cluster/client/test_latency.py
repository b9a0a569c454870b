"""Load-test figures against hand-counted ones."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm.cluster.client.latency import Sample, distribution, summarize


def test_percentiles_are_nearest_rank() -> None:
    found = distribution([float(i) for i in range(100, 0, -1)])
    assert (found.p50, found.p90, found.p99, found.mean) == (50, 90, 99, 50.5)
    assert distribution([7.0]).p99 == 7.0


def test_no_samples_give_nan_not_an_error() -> None:
    report = summarize([], failed=3, concurrency=1, seconds=1.0)
    assert math.isnan(report.time_to_first_token.p50)
    assert (report.requests, report.failed, report.tokens_per_second) == (0, 3, 0)


def test_figures_of_two_requests() -> None:
    samples = [
        Sample(1.0, ((1.5, 1), (1.6, 1), (2.0, 2)), 4, 10),
        Sample(2.0, ((2.1, 1),), 1, 20, restarts=1),
    ]
    report = summarize(samples, failed=0, concurrency=2, seconds=2.0)
    assert report.time_to_first_token.p50 == pytest.approx(0.1)
    assert report.time_to_first_token.p99 == pytest.approx(0.5)
    assert report.inter_token_latency.p99 == pytest.approx(0.2)
    assert (report.tokens_per_second, report.requests_per_second) == (2.5, 1.0)
    assert (report.prompt_tokens, report.completion_tokens, report.restarts) == (30, 5, 1)


@given(st.lists(st.floats(0, 1e3), min_size=1))
def test_percentiles_are_values_and_ordered(values: list[float]) -> None:
    found = distribution(values)
    assert {found.p50, found.p90, found.p99} <= set(values)
    assert min(values) <= found.p50 <= found.p90 <= found.p99 <= max(values)
