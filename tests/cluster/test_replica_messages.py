"""Requests and events on the wire between gateway and replica."""

from flm.cluster.replica_messages import FINISH, to_frame
from flm.proto import flm_pb2
from flm.worker.request import FinishReason, Timings, TokenEvent, TokenLogprobs


def test_frames_of_several_events() -> None:
    first = TokenEvent("a", (1,), (TokenLogprobs(1, -0.5, ((2, -1.0),)),), None, None, 4, 2, 1)
    last = TokenEvent(
        "a", (3,), (TokenLogprobs(3, -0.25),), FinishReason.STOP, 9, 4, 2, 3, Timings(1, 2, 3), "why"
    )
    alone = to_frame([first])
    assert (alone.usage.prompt_tokens, alone.usage.cached_tokens, alone.usage.completion_tokens) == (4, 2, 1)
    both = to_frame([first, last])
    assert list(both.token_ids) == [1, 3]
    assert [entry.token_id for entry in both.logprobs] == [1, 3]
    assert both.logprobs[0].top[0].token_id == 2
    assert (both.finish_reason, both.stop_token_id, both.error) == (flm_pb2.FINISH_REASON_STOP, 9, "why")
    assert (both.usage.completion_tokens, both.timings.decode) == (3, 3)


def test_every_finish_reason_is_known() -> None:
    assert set(FINISH) == set(FinishReason)
