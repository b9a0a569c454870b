"""One generation, over however many replicas it takes.

A request is a pure function of (weights, prompt, params, seed). When a replica is lost in the middle of a stream,
the same request with the tokens so far goes to another replica (or to the same one once it is rebuilt), which
continues with exactly the token that would have come next.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc.aio

from flm.cluster.admission import Options
from flm.cluster.grpc_errors import from_rpc_error, is_ours
from flm.cluster.replicas import Link, Replicas
from flm.proto import flm_pb2
from flm.worker.errors import DeadlineExceeded, FlmError, InternalError, Lost, Overloaded, Unavailable

log = logging.getLogger(__name__)

MAX_RESTARTS = 8
_CALL_MARGIN = 0.05  # seconds kept back of a deadline, so that a clear status still reaches the client
_BROKEN = ("UNAVAILABLE", "INTERNAL", "UNKNOWN", "CANCELLED", "ABORTED", "DATA_LOSS")


class TokenStream:
    """Tokens of stream `index` of a request. `deadline` is loop time, None where the client set none;
    `replica_wait`: seconds to wait for a ready replica then."""

    def __init__(
        self,
        replicas: Replicas,
        prompt_ids: tuple[int, ...],
        options: Options,
        index: int,
        max_context: int,
        deadline: float | None,
        replica_wait: float,
    ) -> None:
        self.restarts = 0
        self.token_ids: list[int] = []  # all that were yielded
        self._replicas = replicas
        self._deadline = deadline
        self._replica_wait = replica_wait
        self._prompt_ids = prompt_ids
        self._salt = options.cache_salt
        params = options.params_of(index)
        self._max_tokens = min(params.max_tokens, max_context - len(prompt_ids))
        self._name = f"{options.request_id}/{index}"
        self._request = flm_pb2.ReplicaGenerateRequest(
            prompt_ids=prompt_ids,
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seed=params.seed,
            stop_token_ids=params.stop_token_ids,
            ignore_eos=params.ignore_eos,
            logprobs=params.logprobs,
            priority=options.priority,
            cache_salt=options.cache_salt,
        )

    async def frames(self) -> AsyncGenerator[flm_pb2.ReplicaFrame]:
        """Frames with tokens, and a last one with a finish reason other than ERROR. Raises FlmError: Lost after
        too many restarts, Overloaded, Unavailable, DeadlineExceeded, or the replica's refusal of the request."""
        refusals: dict[str, Overloaded] = {}  # replica id → its last one
        until = self._wait_until()
        while True:
            if (
                len(self.token_ids) >= self._max_tokens
            ):  # it broke after the last token, before the last frame
                yield self._ended_by_length()
                return
            link = await self._replicas.acquire(self._prompt_ids, self._salt, refusals, until)
            if link is None:
                await self._overloaded(refusals, until)
                refusals.clear()
                continue
            why: FlmError | None = None
            try:
                async with aclosing(self._attempt(link)) as frames:
                    async for frame in frames:
                        yield frame
                        if frame.finish_reason:
                            return
            except grpc.aio.AioRpcError as error:
                why = self._judge(link, error)
            if isinstance(why, Overloaded):
                refusals[link.view.replica_id] = why
            elif not isinstance(why, Unavailable):
                self._count_restart(link)
                until = self._wait_until()

    async def _attempt(self, link: Link) -> AsyncGenerator[flm_pb2.ReplicaFrame]:
        """Frames of one replica; ends without a finish reason where the replica says that it failed."""
        view, token_ids = link.view, self.token_ids
        expected = len(self._prompt_ids) + self._max_tokens
        view.outstanding += expected
        call = link.stub.Generate(self._next_request(), timeout=self._remaining())
        try:
            async for frame in call:
                token_ids.extend(frame.token_ids)
                received = len(frame.token_ids)
                expected -= received
                view.outstanding -= received
                if frame.finish_reason == flm_pb2.FINISH_REASON_ERROR:
                    self._replicas.put_aside(link, frame.error)
                    frame.finish_reason = flm_pb2.FINISH_REASON_UNSPECIFIED
                    if received:
                        yield frame
                    return
                yield frame
        finally:
            view.outstanding -= expected
            call.cancel()  # of no effect where it has ended
            self._replicas.release(link)

    def _judge(self, link: Link, error: grpc.aio.AioRpcError) -> FlmError | None:
        """What to do about a call that failed: Overloaded and Unavailable refusals lead to another replica, None
        to a restart; everything else is raised."""
        typed = from_rpc_error(error)
        if isinstance(typed, Overloaded):
            return typed
        if is_ours(error):
            if isinstance(typed, Unavailable):
                self._replicas.put_aside(link, str(typed))
                return typed
            if isinstance(typed, InternalError):
                log.error("request %s: replica %s: %s", self._name, link.view.replica_id, typed)
            raise typed
        if error.code().name not in _BROKEN:
            raise typed
        if self._deadline is not None and self._remaining() == 0.0:
            raise DeadlineExceeded("the deadline passed while a replica was at work")
        self._replicas.put_aside(link, f"{error.code().name}: {error.details()}")
        return None

    def _count_restart(self, link: Link) -> None:
        self.restarts += 1
        log.warning(
            "request %s: lost on replica %s after %d tokens, restart %d",
            self._name,
            link.view.replica_id,
            len(self.token_ids),
            self.restarts,
        )
        if self.restarts > MAX_RESTARTS:
            raise Lost(
                f"the stream was lost on {self.restarts} replicas, the last was {link.view.replica_id}"
            )

    async def _overloaded(self, refusals: dict[str, Overloaded], until: float) -> None:
        """Every ready replica refused. A new request is refused too; one that has begun waits for its turn."""
        soonest = min(refusals.values(), key=lambda error: error.retry_after)
        loop = asyncio.get_running_loop()
        if not self.token_ids or loop.time() >= until:
            raise soonest
        await asyncio.sleep(min(soonest.retry_after, 1.0, until - loop.time()))

    def _next_request(self) -> flm_pb2.ReplicaGenerateRequest:
        """Ids are unique to the attempt: the replica may not have noticed yet that the last one broke."""
        request = self._request
        request.request_id = f"{self._name}/{secrets.token_hex(6)}"
        del request.resumed_ids[:]
        request.resumed_ids.extend(self.token_ids)
        return request

    def _ended_by_length(self) -> flm_pb2.ReplicaFrame:
        return flm_pb2.ReplicaFrame(finish_reason=flm_pb2.FINISH_REASON_LENGTH)

    def _remaining(self) -> float | None:
        if self._deadline is None:
            return None
        return max(self._deadline - asyncio.get_running_loop().time(), 0.0)

    def _wait_until(self) -> float:
        """Until when to wait for a replica, loop time."""
        now = asyncio.get_running_loop().time()
        if self._deadline is None:
            return now + self._replica_wait
        return self._deadline - min(_CALL_MARGIN, (self._deadline - now) / 10)
