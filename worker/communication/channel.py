"""Channels: the leader's step plans on their way to the other ranks, and their failures on the way back."""

from __future__ import annotations

import contextlib
import queue
from pathlib import Path
from typing import Protocol

import zmq

from flm.worker.errors import RankFailed
from flm.worker.plan import StepPlan, decode_plan, encode_plan

STOP = b""
SEND_MS = 1000


class LeaderChannel(Protocol):
    def send(self, plan: StepPlan) -> None:
        """Give the plan to every follower; returns at once."""
        ...

    def failures(self, wait: float) -> dict[int, str]:
        """What followers said before they failed, by rank; waits at most `wait` seconds for a first word."""
        ...

    def stop(self) -> None:
        """Tell every follower to leave its loop."""
        ...


class FollowerChannel(Protocol):
    def receive(self) -> StepPlan | None:
        """The next plan; None when the leader says stop."""
        ...

    def fail(self, message: str) -> None:
        """Tell the leader why this rank leaves."""
        ...


class NoFollowers:
    """The leader's channel in a group of one."""

    def send(self, plan: StepPlan) -> None:
        """Nobody listens."""

    def failures(self, wait: float) -> dict[int, str]:
        return {}

    def stop(self) -> None:
        """Nobody listens."""


class ThreadChannel:
    """Leader's end of a group whose ranks are threads."""

    def __init__(self, size: int) -> None:
        self.followers = [ThreadFollower(rank, self) for rank in range(1, size)]
        self.failed: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()

    def send(self, plan: StepPlan) -> None:
        data = encode_plan(plan)  # as bytes: ranks must not share mutable plans
        for follower in self.followers:
            follower.inbox.put(data)

    def failures(self, wait: float) -> dict[int, str]:
        found: dict[int, str] = {}
        try:
            while True:
                rank, message = self.failed.get(timeout=0 if found else wait)
                found[rank] = message
        except queue.Empty:
            return found

    def stop(self) -> None:
        for follower in self.followers:
            follower.inbox.put(STOP)


class ThreadFollower:
    def __init__(self, rank: int, leader: ThreadChannel) -> None:
        self.rank, self.leader = rank, leader
        self.inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def receive(self) -> StepPlan | None:
        data = self.inbox.get()
        return decode_plan(data) if data else None

    def fail(self, message: str) -> None:
        self.leader.failed.put((self.rank, message))


def _endpoint(run_dir: Path, rank: int) -> str:
    return f"ipc://{run_dir}/plan-{rank}"


class ZmqLeaderChannel:
    """Leader's end of a group whose ranks are processes: one PAIR socket a follower."""

    def __init__(self, run_dir: Path, size: int) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        for rank in range(1, size):
            socket = context.socket(zmq.PAIR)
            socket.setsockopt(zmq.LINGER, SEND_MS)
            socket.setsockopt(zmq.SNDTIMEO, SEND_MS)  # a follower's connection may still be under way
            socket.bind(_endpoint(run_dir, rank))
            self._sockets[rank] = socket

    def send(self, plan: StepPlan) -> None:
        self._send(encode_plan(plan))

    def _send(self, data: bytes) -> None:
        for rank, socket in self._sockets.items():
            try:
                socket.send(data)
            except zmq.Again:
                raise RankFailed(
                    f"rank {rank} does not take step plans: its queue is full or it is gone"
                ) from None

    def failures(self, wait: float) -> dict[int, str]:
        poller = zmq.Poller()
        for socket in self._sockets.values():
            poller.register(socket, zmq.POLLIN)
        ready = dict(poller.poll(int(wait * 1000)))
        return {r: s.recv().decode() for r, s in self._sockets.items() if s in ready}

    def stop(self) -> None:
        for socket in self._sockets.values():
            with contextlib.suppress(zmq.Again):  # that follower is gone already, which is what stop asks for
                socket.send(STOP)
            socket.close()
        self._sockets = {}


class ZmqFollowerChannel:
    def __init__(self, run_dir: Path, rank: int) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.connect(_endpoint(run_dir, rank))

    def receive(self) -> StepPlan | None:
        data = self._socket.recv()
        return decode_plan(data) if data else None

    def fail(self, message: str) -> None:
        self._socket.send(message.encode())
        self._socket.close()
