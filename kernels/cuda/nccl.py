"""NCCL through CuPy: it moves arrays between the GPUs of a group, on the current stream, so that moves can be captured.

NCCL's own sums are not used: in which order its rings and trees add depends on where an element lies in a message, so a
token's result would depend on what else is in the step. Here NCCL moves parts and `all_reduce.sum_parts` adds them, in
rank order. That costs no more bytes: each rank sends every other its share of the sum, then the sum of its own share.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from flm.kernels.cuda.check import address_of
from flm.kernels.errors import CollectiveFailed, CollectiveTimeout, ToolkitMissing

Array = Any
PACKAGES = "nvidia-nccl-cu13, or nvidia-nccl-cu12 with cupy-cuda12x"
Moves = Sequence[tuple[int, Array]]  # peer, array
HINT = "NCCL_DEBUG=INFO says more"


def load_nccl() -> Any:
    """CuPy's module. Raises ToolkitMissing."""
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise ToolkitMissing(f"CuPy has no NCCL ({error})", PACKAGES) from error
    if not nccl.available:
        raise ToolkitMissing("NCCL's library was not found", PACKAGES)
    return nccl


def unique_id(nccl: Any) -> bytes:
    """What rank 0 gives to all ranks, so that they find each other."""
    return bytes(nccl.get_unique_id())


class NcclLink:
    """One rank's end. Every call raises CollectiveFailed with NCCL's words where NCCL reports an error.

    `stream` gives the current stream's address. Calls of one thread; abort and check may come from any.
    """

    def __init__(self, nccl: Any, comm: Any, rank: int, stream: Callable[[], int]) -> None:
        self._nccl, self._comm, self._rank, self._stream = nccl, comm, rank, stream
        self._types = {
            "float32": nccl.NCCL_FLOAT32, "float16": nccl.NCCL_FLOAT16, "bfloat16": nccl.NCCL_BFLOAT16
        }  # fmt: skip
        self._aborted = False
        self._lock = threading.Lock()

    @classmethod
    def join(cls, nccl: Any, rank: int, world: int, uid: bytes, device: Any, timeout: float) -> NcclLink:
        """Meet the other ranks. Raises CollectiveTimeout where they do not all come in time: NCCL itself would wait for
        ever, on a thread that is left to it then."""
        done: list[Any] = []

        def meet() -> None:
            try:
                device.use()
                done.append(nccl.NcclCommunicator(world, uid, rank))
            except Exception as error:
                done.append(error)

        thread = threading.Thread(target=meet, name="nccl", daemon=True)
        thread.start()
        thread.join(timeout)
        if not done:
            raise CollectiveTimeout(rank, [r for r in range(world) if r != rank], timeout)
        if isinstance(done[0], nccl.NcclError):
            raise CollectiveFailed(rank, f"NCCL could not join {world} ranks: {done[0]}; {HINT}") from done[0]
        if isinstance(done[0], Exception):
            raise done[0]
        return cls(nccl, done[0], rank, device.stream)

    def move(self, sends: Moves, receives: Moves) -> None:
        """Send and receive, all at once. Both sides of a move must give arrays of one size and dtype; empty ones are none."""
        try:
            stream = self._stream()
            self._nccl.groupStart()
            for call, moves in ((self._comm.send, sends), (self._comm.recv, receives)):
                for peer, array in (move for move in moves if move[1].size):
                    call(address_of(array), array.size, self._types[array.dtype.name], peer, stream)
            self._nccl.groupEnd()
        except self._nccl.NcclError as error:
            raise self._failure(error) from error

    def broadcast(self, array: Array, root: int) -> None:
        """array = root's."""
        place, kind = address_of(array), self._types[array.dtype.name]
        try:
            self._comm.broadcast(place, place, array.size, kind, root, self._stream())
        except self._nccl.NcclError as error:
            raise self._failure(error) from error

    def check(self) -> None:
        """Raises CollectiveFailed where NCCL met an error beside the calls."""
        with self._lock:
            if self._aborted:
                return
            try:
                self._comm.check_async_error()
            except self._nccl.NcclError as error:
                raise self._failure(error) from error

    def abort(self) -> None:
        """End what is under way, at once; whatever it was to give is worth nothing."""
        with self._lock:
            if not self._aborted:
                self._aborted = True
                self._comm.abort()

    def _failure(self, error: Exception) -> CollectiveFailed:
        return CollectiveFailed(self._rank, f"NCCL said {error}; {HINT}")
