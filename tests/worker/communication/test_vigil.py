"""Telling hung ranks from slow ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from flm.kernels.errors import CollectiveAborted, CollectiveTimeout
from flm.kernels.reference import ReferenceBackend
from flm.worker.communication.comm import SharedMemoryCommunicator
from flm.worker.communication.vigil import LOOKS, LOOKS_PER_TIMEOUT, PATIENCE, PROOF, Awaited, Vigil, at_work

TIMEOUT = 10.0
PERIOD = TIMEOUT / LOOKS_PER_TIMEOUT


@pytest.fixture
def child() -> Iterator[Callable[[str], int]]:
    """child(program of sh) → its pid; ended after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(program: str) -> int:
        started.append(subprocess.Popen(["sh", "-c", program]))
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.wait()


def becomes(pid: int, busy: bool) -> bool:
    deadline = time.monotonic() + 10
    while at_work(pid) != busy and time.monotonic() < deadline:
        time.sleep(0.01)
    return at_work(pid) == busy


def test_who_computes_or_wants_to_is_at_work(child: Callable[[str], int]) -> None:
    spinning, waiting = child("while :; do :; done"), child("exec sleep 60")
    assert becomes(spinning, True)
    assert becomes(waiting, False)
    assert not at_work(spinning, besides=spinning)  # its only thread
    os.kill(spinning, signal.SIGSTOP)
    assert becomes(spinning, False)
    assert not at_work(2**22 + 1)  # no process has such a number


class World:
    """Ranks whose state the test decides, and a clock of its own. The vigil's thread is stopped: the test looks."""

    def __init__(self, rank: int = 0) -> None:
        self.awaited: dict[int, Awaited] = {1: Awaited(101)}
        self.busy: set[int] = set()  # pids
        self.given_up = 0
        self.vigil = Vigil(
            rank, TIMEOUT, lambda: self.awaited, self.give_up, lambda pid, me: pid in self.busy
        )
        self.vigil.stop()
        self.vigil._thread.join()
        self.now = self.vigil._began = 1000.0

    def give_up(self) -> None:
        self.given_up += 1

    def missing(self) -> tuple[int, ...]:
        """Whom the vigil gave up."""
        return () if self.vigil.failure is None else self.vigil.failure.missing

    def look(self, seconds: float) -> float:
        """Look on for so long; how long the step has been still then."""
        until = self.now + seconds
        while self.now < until - 1e-9:
            self.now += PERIOD
            self.vigil.look(self.now)
        still = self.vigil.still(self.now)
        assert still is not None
        return still


def test_a_rank_that_does_nothing_is_named_in_time() -> None:
    world = World()
    assert world.look(TIMEOUT) == TIMEOUT
    assert world.vigil.failure is None
    world.look(2 * PERIOD)
    assert (world.missing(), world.given_up) == ((1,), 1)
    world.look(60.0)
    assert world.given_up == 1


def test_a_rank_that_is_starved_of_cores_is_not() -> None:
    world = World()
    world.busy = {101}
    assert world.look(5 * TIMEOUT) == 0.0
    world.busy = set()  # and now it hangs
    assert world.look(TIMEOUT) == TIMEOUT
    world.look(2 * PERIOD)
    assert world.missing() == (1,)


def test_an_observer_that_was_held_up_itself_proves_nothing() -> None:
    world = World()
    for _ in range(PROOF - 1):
        world.now += TIMEOUT
        world.vigil.look(world.now)
    assert world.missing() == ()
    world.vigil.look(world.now)
    assert world.missing() == (1,)


def test_threads_that_wake_now_and_then_are_no_sign_of_life() -> None:
    world = World()
    for _ in range(20):
        world.busy = set()
        world.look(PERIOD)
        world.busy = {101}
        world.look((LOOKS - 1) * PERIOD)
    assert world.missing() == (1,)


def test_of_several_the_hung_one_is_named() -> None:
    world = World()
    world.awaited = {1: Awaited(101), 2: Awaited(102)}
    world.busy = {101}
    world.look(TIMEOUT + 1)
    assert world.missing() == (2,)


def test_one_that_comes_forward_is_alive_whatever_its_threads_seem_to_do() -> None:
    world = World()
    for exchange in range(10):
        world.awaited = {1: Awaited(101, exchange)}
        world.look(TIMEOUT / 2)
    assert world.vigil.failure is None
    world.awaited = {2: Awaited(102)}  # another one, after a long step
    assert world.look(TIMEOUT) <= TIMEOUT
    assert world.vigil.failure is None


def test_a_rank_that_waits_for_itself_does_not_give_up_but_tells() -> None:
    world = World()
    world.awaited = {0: Awaited(100)}
    assert world.look(3 * TIMEOUT) == 3 * TIMEOUT
    assert (world.vigil.failure, world.given_up) == (None, 0)


def test_who_spins_for_ever_is_not_at_work_for_ever() -> None:
    world = World()
    world.awaited, world.busy = {0: Awaited(100)}, {100}
    assert world.look(PATIENCE * TIMEOUT) == 0.0
    assert world.look(PERIOD) > PATIENCE * TIMEOUT


def test_short_steps_are_not_looked_at() -> None:
    world = World()
    world.look((LOOKS - 1) * PERIOD)
    assert world.vigil._signs == {}
    world.look(PERIOD)
    assert world.vigil._signs.keys() == {1}
    world.vigil._began = 0.0
    assert world.vigil.still(world.now) is None


def test_a_step_that_was_given_up_raises_why() -> None:
    vigil = World().vigil
    with pytest.raises(CollectiveAborted), vigil.step():
        raise CollectiveAborted(0)
    vigil.failure = CollectiveTimeout(0, (1,), TIMEOUT)
    with pytest.raises(CollectiveTimeout, match="missing ranks: 1"), vigil.step():
        raise CollectiveAborted(0)
    assert vigil.still(time.monotonic()) is None


BUSY = """
import sys, time
from pathlib import Path
from flm.kernels.reference import ReferenceBackend
from flm.worker.communication.comm import SharedMemoryCommunicator
comm = SharedMemoryCommunicator(Path(sys.argv[1]), 1, 2, ReferenceBackend(), 20.0)
while True:
    began = time.monotonic()
    while time.monotonic() - began < 0.8:
        pass
    comm.barrier()
"""


def test_of_processes_the_slow_one_is_awaited_and_the_stopped_one_named(tmp_path: Path) -> None:
    """One that computes for longer than the time-out, and comes; then it is stopped."""
    path = tmp_path / "group.shm"
    with subprocess.Popen([sys.executable, "-c", BUSY, str(path)]) as other:
        try:
            comm = SharedMemoryCommunicator(path, 0, 2, cast(Any, ReferenceBackend()), 20.0)
            comm.set_timeout(0.5)
            assert comm.awaited() == {0: Awaited(os.getpid(), 1)}
            with comm.watched():
                comm.barrier()
            other.send_signal(signal.SIGSTOP)
            with pytest.raises(CollectiveTimeout, match="missing ranks: 1"), comm.watched():
                comm.barrier()
            assert comm.awaited() == {1: Awaited(other.pid, 2)}
            assert comm.still() is None
            comm.abort()
        finally:
            other.kill()
