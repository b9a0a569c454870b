"""One rank's life inside its process: load, connect, serve, end. Knows nothing of what carries it."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import psutil

from flm.cluster.control.ranks import RankEnd, RankReport
from flm.kernels.errors import KernelError
from flm.worker.errors import FlmError
from flm.worker.group.rank import GroupSpec

log = logging.getLogger(__name__)

CONNECT_SECONDS = (
    600.0  # for the slowest rank to load; a rank that dies meanwhile ends the whole group at once
)
LOOK = 0.1  # seconds between looks at the leader's state


class ServedRank(Protocol):
    """flm.worker.group.rank.Rank, or a stand-in of tests."""

    def load(self, on_progress: Callable[[float], None]) -> None: ...
    def connect(self, timeout: float) -> None: ...
    def serve(self) -> None: ...
    def close(self) -> None: ...
    @property
    def replica(self) -> Any: ...


class RankProcess:
    """Belongs to one event loop; blocking work happens on threads."""

    def __init__(
        self, spec: GroupSpec, rank: int, host: str, key: str, served: ServedRank | None = None
    ) -> None:
        """`host` is the address of this node that other nodes can reach, `key` what rank 0's port asks for."""
        self.spec, self.rank, self._host, self._key, self._served = spec, rank, host, key, served
        self._phase, self._fraction, self._address = "starting", 0.0, ""
        self._end: asyncio.Future[RankEnd] | None = None

    async def ended(self) -> RankEnd:
        """Live, on the first call; wait for the end on all."""
        if self._end is None:
            self._end = asyncio.ensure_future(self._live())
        return await asyncio.shield(self._end)

    async def report(self) -> RankReport:
        resident = psutil.Process().memory_info().rss
        kv_tokens, gpu_bytes = (
            getattr(self._served, "cache_facts", (0, 0)) if self._phase == "ready" else (0, 0)
        )
        return RankReport(
            self._phase,
            os.getpid(),
            os.uname().nodename,
            self._fraction,
            self._address,
            resident,
            kv_tokens,
            gpu_bytes,
        )

    async def drain(self) -> None:
        if self.rank == 0 and self._phase == "ready" and self._served is not None:
            self._served.replica.drain()

    async def stop(self) -> None:
        """End in order; the leader tells its followers."""
        if self._served is not None:
            await asyncio.to_thread(self._served.close)

    async def _live(self) -> RankEnd:
        try:
            await self._serve()
            self._phase = "stopped"
            return RankEnd()
        except (FlmError, KernelError) as error:  # KernelError: a format that kernels do not know
            end = RankEnd(str(error), error.permanent)
        except Exception as error:
            log.exception("rank %d of %s failed", self.rank, self.spec.replica_id)
            end = RankEnd(f"internal error: {error!r}")
        self._phase = "failed"
        return end

    async def _serve(self) -> None:
        if self._served is None:
            self._served = await asyncio.to_thread(_real_rank, self.spec, self.rank)
        served = self._served
        self._phase = "loading"
        await asyncio.to_thread(served.load, self._progress)
        self._phase, self._fraction = "connecting", 1.0
        await asyncio.to_thread(served.connect, CONNECT_SECONDS)
        try:
            if self.rank == 0:
                await self._lead(served.replica)
            else:
                self._phase = "ready"
                await asyncio.to_thread(served.serve)
        finally:
            await asyncio.to_thread(served.close)

    async def _lead(self, replica: Any) -> None:
        from flm.cluster.replica.replica_service import ReplicaServer  # followers need no gRPC

        server = ReplicaServer(replica, self.spec.replica_id, self._key, f"{self._host}:0")
        try:
            self._address = await server.start()
            self._phase = "ready"
            while replica.state not in ("failed", "stopped"):
                await asyncio.sleep(LOOK)
            failure = replica.failure if replica.state == "failed" else ""
        finally:
            await server.stop()
        if failure:
            raise FlmError(failure)

    def _progress(self, fraction: float) -> None:
        self._fraction = fraction


def _real_rank(spec: GroupSpec, rank: int) -> ServedRank:
    from flm.worker.group.rank import Rank  # numba and the weights' formats: a second of importing

    Path(spec.run_dir).mkdir(parents=True, exist_ok=True)
    return Rank(spec, rank)


def sigkill(pid: int, started_before: float) -> None:
    """SIGKILL a process of this machine, unless its pid has passed on to one that started after `started_before`."""
    try:
        process = psutil.Process(pid)
        if process.create_time() <= started_before:
            process.kill()
            process.wait(1.0)
    except (psutil.NoSuchProcess, psutil.TimeoutExpired):
        log.debug("process %d is gone, or about to be, at %f", pid, time.time())
