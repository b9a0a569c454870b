"""A controller over fake ranks and a fake gateway."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from fake_cluster import KEY
from fake_host import FakeGatewayLink, FakeHost

from flm.cluster.control.controller import Controller
from flm.cluster.state import Desired, ModelFacts

GIB = 1 << 30
TEXT = """\
name: test
models:
  - name: m
    path: package:nothing
    tensor_parallel: 2
    replicas: {min: 1, max: 6}
    drain_timeout: 1.0
"""


class Bench:
    """A controller that can be killed and started again, over the same ranks and gateway."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.host, self.gateway = folder, FakeHost(), FakeGatewayLink()
        self.desired = Desired(TEXT, "c.yaml", {"m": 2}, {"m": ModelFacts(GIB, 512)}, KEY)

    def start(self) -> Controller:
        self.controller = Controller(self.folder, self.desired, self.host, self.gateway, self.folder / "run")
        self.task = asyncio.create_task(self._run(self.controller))
        return self.controller

    @staticmethod
    async def _run(controller: Controller) -> None:
        await controller.adopt()
        await controller.run()

    async def kill(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        for group in self.controller.groups.values():
            await group.unwatch()

    async def close(self) -> None:
        """End the controller and all ranks."""
        await self.kill()
        await self.host.close()

    async def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> float:
        began = time.monotonic()
        while not condition():
            assert not self.task.done(), self.task.exception()
            assert time.monotonic() - began < seconds, (self.phases(), self.gateway.routes)
            await asyncio.sleep(0.01)
        return time.monotonic() - began

    def phases(self) -> dict[str, str]:
        return {replica_id: group.phase.value for replica_id, group in self.controller.groups.items()}

    def routed(self, *ready: str) -> bool:
        return self.gateway.routes.get("m") == dict.fromkeys(ready, "ready")

    def kinds(self) -> list[str]:
        return [event.kind for event in self.controller.events._events]
