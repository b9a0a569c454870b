"""cupy.cuda.nccl with ranks that are threads: the calls have CuPy 14's names and arguments, and move bytes in memory.

The real ones: get_unique_id() -> bytes; NcclCommunicator(ndev, commId, rank) with send(sendbuf, count, datatype, peer,
stream), recv(recvbuf, count, datatype, peer, stream), broadcast(sendbuff, recvbuff, count, datatype, root, stream),
check_async_error(), abort(); groupStart(), groupEnd(); NcclError.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from typing import Any

REMOTE = "NCCL_ERROR_REMOTE_ERROR: remote process exited or there was a network error"
BROKEN = "NCCL_ERROR_UNHANDLED_CUDA_ERROR: unhandled cuda error (run with NCCL_DEBUG=INFO for details)"


class FakeNcclError(RuntimeError):
    pass


class FakeNccl:
    """The module, as all ranks of one test import it."""

    NCCL_FLOAT16, NCCL_FLOAT32, NCCL_BFLOAT16 = 6, 7, 9
    NcclError = FakeNcclError
    available = True

    def __init__(self) -> None:
        self.meetings: dict[tuple[bytes, int], threading.Barrier] = {}
        self.boxes: dict[tuple[int, int], queue.SimpleQueue[tuple[bytes, int]]] = {}
        self.lock, self.thread = threading.Lock(), threading.local()
        self.comms: dict[int, FakeCommunicator] = {}
        self.calls: list[str] = []

    def get_unique_id(self) -> bytes:
        return bytes(range(128))

    def groupStart(self) -> None:
        self.thread.waiting = []

    def groupEnd(self) -> None:
        waiting, self.thread.waiting = self.thread.waiting, None
        for call in waiting:
            call()

    def NcclCommunicator(self, ndev: int, commId: bytes, rank: int) -> FakeCommunicator:
        assert isinstance(commId, bytes) and len(commId) == 128
        with self.lock:
            meeting = self.meetings.setdefault((commId, ndev), threading.Barrier(ndev))
        meeting.wait()
        self.comms[rank] = FakeCommunicator(self, ndev, rank)
        return self.comms[rank]

    def box(self, source: int, target: int) -> Any:
        with self.lock:
            return self.boxes.setdefault((source, target), queue.SimpleQueue())


class FakeCommunicator:
    """`error`: what check_async_error finds. A receive waits until the message is there, or the communicator is aborted."""

    SIZES = {6: 2, 7: 4, 9: 2}  # noqa: RUF012

    def __init__(self, module: FakeNccl, ndev: int, rank: int) -> None:
        self._module, self._ndev, self._rank = module, ndev, rank
        self.error, self.refuses = "", False
        self.aborted = threading.Event()

    def _now_or_later(self, call: Any) -> None:
        if self.refuses:
            raise FakeNcclError(BROKEN)
        waiting = getattr(self._module.thread, "waiting", None)
        call() if waiting is None else waiting.append(call)

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._module.calls.append("send")
        nbytes = count * self.SIZES[datatype]
        box = self._module.box(self._rank, peer)
        self._now_or_later(lambda: box.put((ctypes.string_at(sendbuf, nbytes), datatype)))

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        box = self._module.box(peer, self._rank)

        def receive() -> None:
            while not self.aborted.is_set():
                try:
                    data, sent_as = box.get(timeout=0.01)
                except queue.Empty:
                    continue
                assert (len(data), sent_as) == (count * self.SIZES[datatype], datatype)
                ctypes.memmove(recvbuf, data, len(data))
                return

        if (
            self._module.thread.__dict__.get("waiting") is not None
        ):  # all sends of a group come before its receives
            self._module.thread.waiting.append(receive)
        else:
            receive()

    def broadcast(
        self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int
    ) -> None:
        self._module.calls.append("broadcast")
        if self._rank != root:
            self.recv(recvbuff, count, datatype, root, stream)
            return
        for peer in range(self._ndev):
            if peer != root:
                self.send(sendbuff, count, datatype, peer, stream)

    def check_async_error(self) -> None:
        if self.error:
            raise FakeNcclError(self.error)

    def abort(self) -> None:
        self.aborted.set()
