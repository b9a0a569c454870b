"""One model's replicas as the gateway uses them: channels, the choice between them, and waiting for one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Sequence

from flm.cluster.gateway.replica_link import ReplicaLink
from flm.cluster.gateway.router import ReplicaRoute, ReplicaView, Router
from flm.worker.errors import Unavailable

log = logging.getLogger(__name__)

PROBE_SECONDS = 0.25  # between probes of a replica that was put aside
RETRY_AFTER = 1.0


class Replicas:
    """All replicas of `model`. `on_change` is called when the number of ready ones may have changed."""

    def __init__(self, model: str, on_change: Callable[[], None], key: str) -> None:
        self.model, self._key = model, key
        self.router = Router()
        self.wanted: int | None = None  # None until the controller has told
        self._on_change = on_change
        self._links: dict[ReplicaView, ReplicaLink] = {}
        self._waiters: set[asyncio.Future[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()

    def update(self, routes: Iterable[ReplicaRoute], wanted: int) -> None:
        """Take the controller's word and connect ahead of the first request."""
        self.router.update(routes)
        self.wanted = wanted
        current = set(self.router.replicas.values())
        for view in current - self._links.keys():
            self._links[view] = ReplicaLink(view, self._key)
        for view in self._links.keys() - current:
            self._links[view].retired = True
            self._close_if_unused(self._links[view])
        for view in current:
            if view.ready:
                self._links[view].connect()
        self._changed()

    async def acquire(
        self, prompt_ids: Sequence[int], cache_salt: str, exclude: Collection[str], until: float
    ) -> ReplicaLink | None:
        """A connected replica, waiting for one until `until` (loop time); Unavailable where none came, at once where
        none is wanted. None where replicas are ready but all of them in `exclude` (replica ids). Give it back with
        release()."""
        loop = asyncio.get_running_loop()
        while True:
            view = self.router.choose(prompt_ids, cache_salt, exclude)
            if view is not None:
                link = self._links[view]
                link.streams += 1
                try:
                    if await link.connected():
                        return link
                except BaseException:
                    self.release(link)
                    raise
                self.put_aside(link, "cannot connect")
                self.release(link)
            elif any(v.ready for v in self.router.replicas.values()):
                return None
            elif self.wanted == 0:
                raise Unavailable(f"model {self.model!r} is scaled to 0 replicas", RETRY_AFTER)
            else:
                await self._wait_for_change(until - loop.time())

    def release(self, link: ReplicaLink) -> None:
        link.streams -= 1
        self._close_if_unused(link)

    def put_aside(self, link: ReplicaLink, why: str) -> None:
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
        self.update((), 0)
        for link in list(self._links.values()):
            link.streams = 0
            self._close_if_unused(link)
        await asyncio.gather(*self._closing)

    async def _probe(self, link: ReplicaLink) -> None:
        while link.view.broken and not link.retired:
            await asyncio.sleep(PROBE_SECONDS)
            if await link.healthy() and link.view.broken:
                link.view.broken = False
                self._changed()

    async def _wait_for_change(self, seconds: float) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait_for(waiter, max(seconds, 0))
        except TimeoutError:
            states = [f"{v.replica_id} {v.state}" for v in self.router.replicas.values()]
            became = "became ready in time" if seconds > 0 else "is ready"
            raise Unavailable(
                f"no replica of model {self.model!r} {became} ({', '.join(states) or 'there are none'})",
                RETRY_AFTER,
            ) from None
        finally:
            self._waiters.discard(waiter)

    def _changed(self) -> None:
        if self.router.num_ready or self.wanted == 0:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
        self._on_change()

    def _close_if_unused(self, link: ReplicaLink) -> None:
        if not link.retired or link.streams or self._links.pop(link.view, None) is None:
            return
        task = asyncio.get_running_loop().create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
