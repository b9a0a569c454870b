"""Every wrong field is named as the proto names it."""

import math
from typing import Any

import pytest

from flm.cluster.gateway.admission import admit, check_ids, check_messages, derive_seed
from flm.proto import flm_pb2
from flm.worker.errors import InvalidRequest


def options(**fields: Any) -> flm_pb2.SamplingOptions:
    return flm_pb2.SamplingOptions(**fields)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": -1}, "sampling.max_tokens"),
        ({"max_tokens": 0}, "sampling.max_tokens"),
        ({"temperature": math.nan}, "sampling.temperature"),
        ({"temperature": -0.5}, "sampling.temperature"),
        ({"top_k": -1}, "sampling.top_k"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"top_p": 1.5}, "sampling.top_p"),
        ({"min_p": math.inf}, "sampling.min_p"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
        ({"presence_penalty": math.nan}, "sampling.presence_penalty"),
        ({"frequency_penalty": -1e9}, "sampling.frequency_penalty"),
        ({"stop_token_ids": [-1]}, "sampling.stop_token_ids"),
        ({"stop_token_ids": range(257)}, "sampling.stop_token_ids"),
        ({"logprobs": 21}, "sampling.logprobs"),
        ({"logprobs": 11}, "sampling.logprobs"),
        ({"n": 0}, "sampling.n"),
        ({"n": 17}, "sampling.n"),
        ({"stop": [b"ok", b"\xff\xfe"]}, "sampling.stop[1]"),
        ({"stop": [b""]}, "sampling.stop[0]"),
        ({"stop": [b"x"] * 17}, "sampling.stop"),
        ({"request_id": "x" * 300}, "sampling.request_id"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        admit(options(**fields), 4, 100, vocab_size=10)
    assert caught.value.field == field
    assert "expected" in caught.value.message


def test_defaults() -> None:
    admitted = admit(options(), 4, 5000)
    assert admitted.params.max_tokens == 1024
    assert (admitted.n, admitted.echo, admitted.stops) == (1, False, ())
    assert admitted.request_id
    assert admit(options(), 4, 100).params.max_tokens == 96
    assert admit(options(), 4, 100).params.seed != admitted.params.seed


def test_zero_is_a_value_not_an_absence() -> None:
    admitted = admit(options(temperature=0, seed=0, logprobs=0), 4, 100)
    assert (admitted.params.temperature, admitted.params.seed, admitted.params.logprobs) == (0.0, 0, 0)


@pytest.mark.parametrize("num_prompt", [0, 100, 101])
def test_prompts_that_leave_no_room(num_prompt: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        admit(options(), num_prompt, 100)
    assert caught.value.field == "prompt"


def test_seeds_of_n_streams() -> None:
    admitted = admit(options(seed=7, n=16), 4, 100)
    seeds = [admitted.params_of(i).seed for i in range(16)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 16
    assert seeds[3] == derive_seed(7, 3)
    assert derive_seed(2**64 - 1, 15) < 2**64


def test_messages() -> None:
    message = flm_pb2.Message
    assert check_messages([message(role="user", content="x")], 9) == [{"role": "user", "content": "x"}]
    for count in (0, 9):
        with pytest.raises(InvalidRequest, match=f"messages: expected 1 to 8 .* 9 tokens, got {count}"):
            check_messages([message(role="user")] * count, 9)
    with pytest.raises(InvalidRequest, match=r"messages\[1\].role: expected one of system, user, assistant"):
        check_messages([message(role="user"), message(role="wizard")], 9)


def test_token_ids() -> None:
    check_ids([0, 9], 10, "ids")
    with pytest.raises(InvalidRequest, match="ids: expected token ids from 0 to 9, got 10"):
        check_ids([1, 10], 10, "ids")
