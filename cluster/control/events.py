"""What happened in the cluster, newest last: a bounded log that operators read and follow."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

KEPT = 1000  # events


@dataclass(frozen=True)
class Event:
    time: float  # seconds since the epoch
    kind: str  # replica_starting, replica_ready, replica_failed, replica_draining, replica_stopped, scaled, …
    message: str = ""
    model: str = ""
    replica_id: str = ""


class EventLog:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=KEPT)
        self._followers: set[asyncio.Queue[Event]] = set()

    def add(self, kind: str, message: str = "", *, model: str = "", replica_id: str = "") -> None:
        event = Event(time.time(), kind, message, model, replica_id)
        self._events.append(event)
        for follower in self._followers:
            if follower.full():
                follower.get_nowait()  # a follower that does not read loses the oldest
            follower.put_nowait(event)

    async def follow(self, replay: bool) -> AsyncIterator[Event]:
        """Events from now on, after those kept so far where `replay` is set. Never ends by itself."""
        queue: asyncio.Queue[Event] = asyncio.Queue(KEPT)
        for event in self._events if replay else ():
            queue.put_nowait(event)
        self._followers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._followers.discard(queue)
