"""The worker's requests and events as messages of flm.v1.Replica."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from google.protobuf.message import Message

from flm.cluster.wire.grpc_errors import to_status
from flm.cluster.wire.listen import bearer
from flm.proto import flm_pb2
from flm.worker.errors import NotFinite, Unavailable
from flm.worker.request import FinishReason, Request, SamplingParams, TokenEvent

REPLICA_ID = "flm-replica-id"
MAX_BYTES = 4 << 20  # of one message, unless a single request or frame has more
MAX_EVENTS = 4096  # of one frame: with logprobs of 20 alternatives each about a megabyte
M = TypeVar("M", bound=Message)
FINISH = {  # all but NOT_FINITE, which goes as a refusal does
    FinishReason.STOP: flm_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: flm_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: flm_pb2.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: flm_pb2.FINISH_REASON_ERROR,
}


def call_metadata(key: str, replica_id: str) -> tuple[tuple[str, str], ...]:
    """Metadata of every call of flm.v1.Replica: the cluster's key, and whom it is meant for."""
    return (*bearer(key), (REPLICA_ID, replica_id))


def check_addressee(metadata: Any, replica_id: str) -> None:
    """Unavailable where a call was meant for another replica, which had this address before."""
    meant = next((value for key, value in metadata or () if key == REPLICA_ID), "")
    if meant != replica_id:
        raise Unavailable(f"replica {meant!r} is not here: this is {replica_id!r}")


def batches(messages: Iterable[M]) -> Iterator[list[M]]:
    """Runs of messages that make up one message of at most MAX_BYTES."""
    batch: list[M] = []
    size = 0
    for message in messages:
        more = message.ByteSize()
        if batch and size + more > MAX_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(message)
        size += more
    if batch:
        yield batch


def to_steps(
    refusals: list[flm_pb2.ReplicaFrame], events: Iterable[list[TokenEvent]]
) -> list[flm_pb2.ReplicaStep]:
    """Refusals and the events of each request, in messages that every gateway takes: after a pause of its own, one
    may be sent everything that came up since."""
    frames = [
        to_frame(of_one[start : start + MAX_EVENTS])
        for of_one in events
        for start in range(0, len(of_one), MAX_EVENTS)
    ]
    return [flm_pb2.ReplicaStep(frames=batch) for batch in batches([*refusals, *frames])]


def to_request(request: flm_pb2.ReplicaGenerateRequest) -> Request:
    """InvalidRequest where a value is out of range (the gateway has checked them before)."""
    return Request(
        request_id=request.request_id,
        prompt_ids=tuple(request.prompt_ids),
        params=SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            seed=request.seed,
            stop_token_ids=tuple(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
            logprobs=request.logprobs if request.HasField("logprobs") else None,
            adapter=request.adapter,
        ),
        resumed_ids=tuple(request.resumed_ids),
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


def to_frame(events: list[TokenEvent]) -> flm_pb2.ReplicaFrame:
    """One frame for `events`, which are of one request and in order. The first frame of a stream and the last
    one carry its usage and timings."""
    last = events[-1]
    token_ids = last.token_ids if len(events) == 1 else [t for event in events for t in event.token_ids]
    frame = flm_pb2.ReplicaFrame(request_id=last.request_id, token_ids=token_ids)
    for event in events:
        for entry in event.logprobs:
            top = [flm_pb2.TopLogprob(token_id=t, logprob=p) for t, p in entry.top]
            frame.logprobs.append(
                flm_pb2.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob, top=top)
            )
    if last.finish_reason is not None or last.completion_tokens == len(token_ids):
        frame.usage.prompt_tokens = last.prompt_tokens
        frame.usage.cached_tokens = last.cached_tokens
        frame.usage.completion_tokens = last.completion_tokens
        timings = events[0].timings if last.finish_reason is None else last.timings
        frame.timings.queue = timings.queue
        frame.timings.prefill = timings.prefill
        frame.timings.decode = timings.decode
    if last.finish_reason is not None:
        if last.finish_reason is FinishReason.NOT_FINITE:
            frame.refusal = to_status(NotFinite(last.error)).SerializeToString()
            return frame
        frame.finish_reason = FINISH[last.finish_reason]
        frame.error = last.error
        if last.stop_token_id is not None:
            frame.stop_token_id = last.stop_token_id
    return frame
