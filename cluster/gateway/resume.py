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

from flm.cluster.gateway.admission import Options
from flm.cluster.gateway.replica_link import Broken, ReplicaLink
from flm.cluster.gateway.replicas import Replicas
from flm.proto import flm_pb2
from flm.worker.errors import Lost, NotFinite, Overloaded, Unavailable

log = logging.getLogger(__name__)

MAX_RESTARTS = 8
_CALL_MARGIN = 0.05  # seconds kept back of a deadline, so that a clear status still reaches the client


class TokenStream:
    """Tokens of stream `index` of a request. `deadline` is loop time, None where the client set none;
    `replica_wait`: seconds to wait for a ready replica then; 0: not at all, whatever the deadline."""

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
        params = options.params_of(index)
        self._salt = f"{params.adapter} {options.cache_salt}"  # what shares cached prefixes
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
            adapter=params.adapter,
        )

    async def frames(self) -> AsyncGenerator[flm_pb2.ReplicaFrame]:
        """Frames with tokens, and a last one with a finish reason other than ERROR. Raises FlmError: Lost after
        too many restarts, Overloaded, Unavailable, DeadlineExceeded, NotFinite, or the replica's refusal of the request."""
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
            try:
                async with aclosing(self._attempt(link)) as frames:
                    async for frame in frames:
                        yield frame
                        if frame.finish_reason:
                            return
            except Overloaded as error:
                refusals[link.view.replica_id] = error
                continue
            except Unavailable as error:
                self._replicas.put_aside(link, str(error))
                continue
            except NotFinite as error:
                log.error("request %s: model %s %s", self._name, self._replicas.model, error)
                raise NotFinite(f"model {self._replicas.model!r} {error}") from None
            except Broken as error:
                self._replicas.put_aside(link, str(error))
            self._count_restart(link)
            until = self._wait_until()

    async def _attempt(self, link: ReplicaLink) -> AsyncGenerator[flm_pb2.ReplicaFrame]:
        """Frames of one replica; ends without a finish reason where the replica says that it failed. Raises
        Broken, or the replica's refusal."""
        view, token_ids = link.view, self.token_ids
        expected = len(self._prompt_ids) + self._max_tokens
        view.outstanding += expected
        inbox = link.open(self._next_request(), self._deadline)
        try:
            while True:
                frame = await inbox.take()
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
                if frame.finish_reason:
                    return
        finally:
            view.outstanding -= expected
            link.close_inbox(inbox)
            self._replicas.release(link)

    def _count_restart(self, link: ReplicaLink) -> None:
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

    def _wait_until(self) -> float:
        """Until when to wait for a replica, loop time."""
        now = asyncio.get_running_loop().time()
        if self._deadline is None or not self._replica_wait:
            return now + self._replica_wait
        return self._deadline - min(_CALL_MARGIN, (self._deadline - now) / 10)
