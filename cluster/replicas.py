"""One model's replicas as the gateway uses them: channels, the choice between them, and waiting for one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from flm.cluster.listen import CHANNEL_OPTIONS
from flm.cluster.router import ReplicaRoute, ReplicaView, Router
from flm.proto import flm_pb2, flm_pb2_grpc
from flm.worker.errors import Unavailable

log = logging.getLogger(__name__)

CONNECT_SECONDS = 2.0
PROBE_SECONDS = 0.25  # between probes of a replica that was put aside
RETRY_AFTER = 1.0


@dataclass(slots=True, eq=False)
class Link:
    """A channel to one replica, and how many streams go over it."""

    view: ReplicaView
    channel: grpc.aio.Channel
    stub: flm_pb2_grpc.ReplicaStub
    streams: int = 0
    retired: bool = False  # the controller no longer names this replica; close after the last stream
    probe: asyncio.Task[None] | None = None


class Replicas:
    """All replicas of `model`. `on_change` is called when the number of ready ones may have changed."""

    def __init__(self, model: str, on_change: Callable[[], None]) -> None:
        self.model = model
        self.router = Router()
        self._on_change = on_change
        self._links: dict[ReplicaView, Link] = {}
        self._waiters: set[asyncio.Future[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()

    def update(self, routes: Iterable[ReplicaRoute]) -> None:
        """Take the controller's word and connect ahead of the first request."""
        self.router.update(routes)
        current = set(self.router.replicas.values())
        for view in current - self._links.keys():
            options = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
            channel = grpc.aio.insecure_channel(view.address, options=options)
            self._links[view] = Link(view, channel, flm_pb2_grpc.ReplicaStub(channel))
        for view in self._links.keys() - current:
            self._links[view].retired = True
            self._close_if_unused(self._links[view])
        for view in current:
            if view.ready:
                self._links[view].channel.get_state(try_to_connect=True)
        self._changed()

    async def acquire(
        self, prompt_ids: Sequence[int], cache_salt: str, exclude: Collection[str], until: float
    ) -> Link | None:
        """A connected replica, waiting for one until `until` (loop time); Unavailable where none came. None where
        replicas are ready but all of them in `exclude` (replica ids). Give it back with release()."""
        loop = asyncio.get_running_loop()
        while True:
            view = self.router.choose(prompt_ids, cache_salt, exclude)
            if view is not None:
                link = self._links[view]
                link.streams += 1
                try:
                    if await _connected(link.channel):
                        return link
                except BaseException:
                    self.release(link)
                    raise
                self.put_aside(link, "cannot connect")
                self.release(link)
            elif any(v.ready for v in self.router.replicas.values()):
                return None
            else:
                await self._wait_for_change(until - loop.time())

    def release(self, link: Link) -> None:
        link.streams -= 1
        self._close_if_unused(link)

    def put_aside(self, link: Link, why: str) -> None:
        """Send nothing more to a replica until new routes call it ready or it answers a probe."""
        if link.view.broken or link.retired:
            return
        link.view.broken = True
        log.warning("model %s: replica %s is put aside: %s", self.model, link.view.replica_id, why)
        if link.probe is None or link.probe.done():
            link.probe = asyncio.get_running_loop().create_task(self._probe(link))
        self._changed()

    async def close(self) -> None:
        """Close all channels; calls on them end."""
        self.update(())
        for link in list(self._links.values()):
            link.streams = 0
            self._close_if_unused(link)
        await asyncio.gather(*self._closing)

    async def _probe(self, link: Link) -> None:
        while link.view.broken and not link.retired:
            await asyncio.sleep(PROBE_SECONDS)
            try:
                answer = await link.stub.Heartbeat(flm_pb2.HeartbeatRequest(), timeout=CONNECT_SECONDS)
            except grpc.aio.AioRpcError:
                continue
            if answer.state == flm_pb2.REPLICA_STATE_READY and link.view.broken:
                link.view.broken = False
                self._changed()

    async def _wait_for_change(self, seconds: float) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait_for(waiter, max(seconds, 0))
        except TimeoutError:
            states = [f"{v.replica_id} {v.state}" for v in self.router.replicas.values()]
            raise Unavailable(
                f"no replica of model {self.model!r} became ready in time ({', '.join(states) or 'there are none'})",
                RETRY_AFTER,
            ) from None
        finally:
            self._waiters.discard(waiter)

    def _changed(self) -> None:
        if self.router.num_ready:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
        self._on_change()

    def _close_if_unused(self, link: Link) -> None:
        if not link.retired or link.streams or self._links.pop(link.view, None) is None:
            return
        if link.probe is not None:
            link.probe.cancel()
        task = asyncio.get_running_loop().create_task(link.channel.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def _connected(channel: grpc.aio.Channel) -> bool:
    """Whether the channel is or comes up; so that a call which fails later is known to have been on its way."""
    state = channel.get_state(try_to_connect=True)
    if state is grpc.ChannelConnectivity.READY:
        return True
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            while state in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING):
                await channel.wait_for_state_change(state)
                state = channel.get_state(try_to_connect=True)
    except TimeoutError:
        return False
    return state is grpc.ChannelConnectivity.READY
