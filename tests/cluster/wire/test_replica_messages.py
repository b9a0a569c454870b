"""Requests and events on the wire between gateway and replica."""

from flm.cluster.wire.grpc_errors import from_status_bytes
from flm.cluster.wire.replica_messages import FINISH, MAX_BYTES, to_frame, to_steps
from flm.proto import flm_pb2
from flm.worker.errors import NotFinite
from flm.worker.request import FinishReason, Timings, TokenEvent, TokenLogprobs


def test_frames_of_several_events() -> None:
    first = TokenEvent("a", (1,), (TokenLogprobs(1, -0.5, ((2, -1.0),)),), None, None, 4, 2, 1, Timings(1, 2))
    last = TokenEvent(
        "a", (3,), (TokenLogprobs(3, -0.25),), FinishReason.STOP, 9, 4, 2, 3, Timings(1, 2, 3), "why"
    )
    alone = to_frame([first])
    assert (alone.usage.prompt_tokens, alone.usage.cached_tokens, alone.usage.completion_tokens) == (4, 2, 1)
    assert (alone.timings.queue, alone.timings.prefill, alone.timings.decode) == (1, 2, 0)
    both = to_frame([first, last])
    assert list(both.token_ids) == [1, 3]
    assert [entry.token_id for entry in both.logprobs] == [1, 3]
    assert both.logprobs[0].top[0].token_id == 2
    assert (both.finish_reason, both.stop_token_id, both.error) == (flm_pb2.FINISH_REASON_STOP, 9, "why")
    assert (both.usage.completion_tokens, both.timings.decode) == (3, 3)


def test_what_has_come_up_is_sent_in_messages_that_arrive() -> None:
    top = tuple((2**30 + i, -1.0) for i in range(20))
    long = [
        TokenEvent("a", (i,), (TokenLogprobs(i, -0.5, top),), completion_tokens=i + 1) for i in range(50_000)
    ]
    short = [[TokenEvent(str(i), (i,))] for i in range(3)]
    refusal = flm_pb2.ReplicaFrame(request_id="r", refusal=b"no")
    steps = to_steps([refusal], [long, *short])
    assert max(step.ByteSize() for step in steps) < MAX_BYTES + 100
    frames = [frame for step in steps for frame in step.frames]
    assert [t for f in frames if f.request_id == "a" for t in f.token_ids] == list(range(50_000))
    assert [f.request_id for f in frames if f.request_id != "a"] == ["r", "0", "1", "2"]
    assert [bool(f.usage.completion_tokens) for f in frames if f.request_id == "a"][:2] == [True, False]
    assert to_steps([], []) == []


def test_every_finish_reason_is_known() -> None:
    assert set(FINISH) == set(FinishReason) - {FinishReason.NOT_FINITE}


def test_logits_that_are_not_finite_end_a_stream_behind_its_tokens() -> None:
    events = [TokenEvent("a", (1,)), TokenEvent("a", finish_reason=FinishReason.NOT_FINITE, error="why")]
    frame = to_frame(events)
    error = from_status_bytes(frame.refusal)
    assert (list(frame.token_ids), frame.finish_reason) == ([1], flm_pb2.FINISH_REASON_UNSPECIFIED)
    assert (type(error), str(error)) == (NotFinite, "why")
