"""Channels: the leader's step plans on their way to the other ranks, and their failures on the way back."""

from __future__ import annotations

import contextlib
import queue
from typing import Protocol

from flm.worker.plan import StepPlan, decode_plan, encode_plan

STOP = b""


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

    def expects(self, wait: float) -> bool:
        """Whether receive() would return at once, or does so within `wait` seconds."""
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
        self._next: bytes | None = None  # taken out and not received

    def receive(self) -> StepPlan | None:
        data = self.inbox.get() if self._next is None else self._next
        self._next = None
        return decode_plan(data) if data else None

    def expects(self, wait: float) -> bool:
        if self._next is None:
            with contextlib.suppress(queue.Empty):
                self._next = self.inbox.get(timeout=wait)
        return self._next is not None

    def fail(self, message: str) -> None:
        self.leader.failed.put((self.rank, message))
