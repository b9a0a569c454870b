"""A rank's life: what it reports on the way, and why it ended."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from fake_host import FakeRank

from flm.cluster.control.group import ReplicaGroup
from flm.cluster.control.ranks import RankEnd, RankReport
from flm.cluster.replica.rank_process import RankProcess, sigkill
from flm.kernels.errors import UnsupportedDevice
from flm.worker.errors import CheckpointError, OutOfMemory, RankFailed
from flm.worker.group.rank import GroupSpec

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
SPEC = GroupSpec("m-0", "m", "/nowhere", tensor_parallel=2)


async def reach(process: RankProcess, phase: str) -> None:
    async with asyncio.timeout(60):
        while (await process.report()).phase != phase:
            await asyncio.sleep(0.01)


async def test_a_leader_serves_until_it_is_stopped() -> None:
    process = RankProcess(SPEC, 0, "127.0.0.1", "key", FakeRank(0))
    assert (await process.report()).phase == "starting"
    ends = [
        asyncio.create_task(process.ended()) for _ in range(2)
    ]  # the second asks as a new controller does
    await reach(process, "ready")
    report = await process.report()
    assert report.address.startswith("127.0.0.1:")
    assert (report.fraction, report.pid > 0, report.resident_bytes > 0) == (1.0, True, True)
    await process.stop()
    assert await asyncio.gather(*ends) == [RankEnd(), RankEnd()]
    assert (await process.report()).phase == "stopped"


async def test_a_leader_that_fails_says_why() -> None:
    rank = FakeRank(0)
    process = RankProcess(SPEC, 0, "127.0.0.1", "key", rank)
    end = asyncio.create_task(process.ended())
    await reach(process, "ready")
    rank.replica.fail("rank 1 hung")
    assert await end == RankEnd("rank 1 hung")
    assert (await process.report()).phase == "failed"


async def test_a_load_that_fails_ends_the_rank_with_the_typed_message() -> None:
    process = RankProcess(
        SPEC, 1, "127.0.0.1", "key", FakeRank(1, CheckpointError("weights.gguf", "truncated"))
    )
    assert await process.ended() == RankEnd("weights.gguf: truncated", permanent=True)
    assert (await process.report()).fraction == 0.5


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (replace(SPEC, path="/nowhere"), "/nowhere"),
        (replace(SPEC, path=str(GOLDEN / "llama2"), device="tpu"), "device: expected cpu or cuda, got 'tpu'"),
    ],
)
async def test_a_real_rank_that_cannot_load_says_that_trying_again_will_not_do(
    spec: GroupSpec, words: str, tmp_path: Path
) -> None:
    end = await RankProcess(replace(spec, run_dir=str(tmp_path)), 1, "127.0.0.1", "key").ended()
    assert words in end.reason
    assert end.permanent


class Failing(FakeRank):
    def __init__(self, error: Exception) -> None:
        super().__init__(1)
        self.error = error
        self.closed = False

    def serve(self) -> None:
        raise self.error

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (RankFailed("the leader is gone"), RankEnd("the leader is gone")),
        (OutOfMemory("the GPU has no room"), RankEnd("the GPU has no room")),
        (UnsupportedDevice("no driver"), RankEnd("no driver", permanent=True)),
        (KeyError("x"), RankEnd("internal error: KeyError('x')")),
    ],
)
async def test_a_follower_that_fails_lets_go_of_its_group(error: Exception, end: RankEnd) -> None:
    rank = Failing(error)
    assert await RankProcess(SPEC, 1, "127.0.0.1", "key", rank).ended() == end
    assert rank.closed


async def test_progress_is_seen_while_weights_load() -> None:
    go_on = threading.Event()

    class Slow(FakeRank):
        def load(self, on_progress: Callable[[float], None]) -> None:
            on_progress(0.25)
            assert go_on.wait(60)

    process = RankProcess(SPEC, 1, "127.0.0.1", "key", Slow(1))
    end = asyncio.create_task(process.ended())
    await reach(process, "loading")
    async with asyncio.timeout(60):
        while (await process.report()).fraction != 0.25:
            await asyncio.sleep(0.01)
    go_on.set()
    await reach(process, "ready")
    await process.stop()
    await end


def test_sigkill_spares_a_process_that_was_given_the_pid_later() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        sigkill(process.pid, started_before=time.time() - 3600)
        assert process.poll() is None
        sigkill(process.pid, started_before=time.time() + 1)
        assert not psutil.pid_exists(process.pid)
    sigkill(process.pid, started_before=time.time())  # gone: nothing to do


async def test_a_replica_that_is_ready_tells_of_its_memory() -> None:
    group = ReplicaGroup(SPEC, "n0", {}, lambda: None, "key", address="127.0.0.1:1")
    group.since = group.created + 2
    assert group.said_ready() == "at 127.0.0.1:1 after 2.0 s"
    for rank, taken in ((0, 70 << 30), (1, 71 << 30)):
        group.reports[rank] = RankReport("ready", kv_tokens=4096, gpu_bytes=taken)
    assert group.said_ready() == "at 127.0.0.1:1 after 2.0 s; KV cache of 4,096 tokens, 71 GiB of a GPU"
