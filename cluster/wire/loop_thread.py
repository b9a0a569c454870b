"""An event loop on a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

log = logging.getLogger(__name__)
Result = TypeVar("Result")

PAUSE = 1.0  # seconds before a process that cannot go on ends: whoever starts it again does not spin


class LoopThread:
    """Work on it begins when a process starts, be it for the first time or after a crash, and nobody has to ask."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name=name, daemon=True).start()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` for as long as the process lives: where it fails, the process ends and Ray starts another."""
        asyncio.run_coroutine_threadsafe(self._guard(work), self.loop)

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except BaseException:
            log.exception("giving up; this process will be started again")
            await asyncio.sleep(PAUSE)
            logging.shutdown()
            os._exit(1)
