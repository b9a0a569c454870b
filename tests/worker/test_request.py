"""Requests and sampling parameters refuse what makes no sense, and say what was expected."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from flm.worker.errors import InvalidRequest
from flm.worker.request import MAX_LOGPROBS, Request, SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("max_tokens", 0, "[1, 2147483647]"),
        ("max_tokens", -5, "[1, 2147483647]"),
        ("temperature", -0.1, "[0.0, 100.0]"),
        ("temperature", math.nan, "[0.0, 100.0]"),
        ("temperature", math.inf, "[0.0, 100.0]"),
        ("top_k", -1, "[0, 2147483647]"),
        ("top_p", 0.0, "(0.0, 1.0]"),
        ("top_p", 1.01, "(0.0, 1.0]"),
        ("min_p", -0.5, "[0.0, 1.0]"),
        ("repetition_penalty", 0.0, "[0.01, 100.0]"),
        ("presence_penalty", math.nan, "[-100.0, 100.0]"),
        ("frequency_penalty", 101, "[-100.0, 100.0]"),
        ("seed", -1, "64-bit"),
        ("seed", 2**64, "64-bit"),
        ("logprobs", MAX_LOGPROBS + 1, "0 to 20"),
        ("logprobs", -1, "0 to 20"),
        ("stop_token_ids", (-1,), ">= 0"),
        ("stop_token_ids", (2**31,), ">= 0"),
    ],
)
def test_bad_sampling_params_name_field_value_and_range(field: str, value: Any, expected: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert caught.value.code == "INVALID_ARGUMENT"
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 1),
        ("temperature", 0),
        ("top_p", 1.0),
        ("top_p", 1e-9),
        ("min_p", 1),
        ("seed", 2**64 - 1),
        ("logprobs", 0),
        ("logprobs", MAX_LOGPROBS),
        ("stop_token_ids", (0, 2**31 - 1)),
    ],
)
def test_bounds_themselves_are_allowed(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


def test_defaults_switch_every_filter_off() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)


def test_request_needs_a_prompt() -> None:
    with pytest.raises(InvalidRequest, match="at least one token"):
        Request("r", ())


def test_resumed_tokens_must_leave_something_to_generate() -> None:
    params = SamplingParams(max_tokens=3)
    assert Request("r", (1,), params, resumed_ids=(5, 6)).resumed_ids == (5, 6)
    with pytest.raises(InvalidRequest, match="3 tokens already reach max_tokens"):
        Request("r", (1,), params, resumed_ids=(5, 6, 7))


def test_requests_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Request("r", (1,)).priority = 3  # type: ignore[misc]
