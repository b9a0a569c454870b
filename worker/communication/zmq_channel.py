"""Channels between processes, by sockets; one process needs no ZeroMQ."""

from __future__ import annotations

import contextlib
from pathlib import Path

import zmq

from flm.worker.communication.channel import STOP
from flm.worker.errors import RankFailed
from flm.worker.plan import StepPlan, decode_plan, encode_plan

SEND_MS = 1000


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

    def expects(self, wait: float) -> bool:
        return bool(self._socket.poll(int(wait * 1000)))

    def fail(self, message: str) -> None:
        self._socket.send(message.encode())
        self._socket.close()
