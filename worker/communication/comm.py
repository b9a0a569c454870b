"""Communicators: every value that crosses ranks inside a step goes through one of these.

All of them add in rank order, so every rank holds the same bits. A communicator is used by one thread.
"""

from __future__ import annotations

import mmap
import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flm.kernels.backend import Backend
from flm.kernels.group import Group, flag_index
from flm.worker.communication.vigil import PATIENCE, Awaited, Vigil
from flm.worker.errors import RankFailed

Array = Any
PID = 4  # word of a rank's line in the group's memory: its process


class Communicator(Protocol):
    """Collectives over the ranks of one replica group. Arrays of the rank's backend, float32 or its activations."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Array) -> None:
        """x = the sum of all ranks' x, in place."""
        ...

    def all_reduce_rms_norm(
        self, ops: Backend, x_TE: Array, delta_TE: Array, weight_E: Array, eps: float, out_TE: Array
    ) -> None:
        """x += the sum of all ranks' delta; then out = rms_norm(x), with the bits of `all_reduce` and `add_rms_norm` of
        `ops`, this rank's backend. What delta holds after is undefined."""
        ...

    def all_gather_cols(self, x_SN: Array, out_SN: Array, widths: tuple[int, ...]) -> None:
        """Concatenate the ranks' columns; rank r contributes widths[r]."""
        ...

    def broadcast(self, x: Array, root: int = 0) -> None:
        """x = root's x, in place."""
        ...

    def barrier(self) -> None:
        """Return once every rank is here; raises CollectiveTimeout naming the ranks that are not."""
        ...

    def swap(self, mine: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order: for what is agreed upon outside of steps."""
        ...

    def watched(self) -> AbstractContextManager[None]:
        """Around the ops of a step. Where collectives do not raise when they are called, what went wrong raises at its
        end, which comes within the time-out."""
        ...

    def launching(self) -> AbstractContextManager[None]:
        """As watched(), around the launch of a step that may go on after it; awaiting() sees its end."""
        ...

    def awaiting(self) -> AbstractContextManager[None]:
        """Around the wait for the oldest step that was launched and not yet waited for. What went wrong in it raises, within
        the time-out."""
        ...

    def set_timeout(self, seconds: float) -> None:
        """Of every wait from now on."""
        ...

    def still(self) -> float | None:
        """Seconds that the step under way has shown no sign of life; None between steps, and where nobody looks."""
        ...

    def abort(self) -> None:
        """Make every rank's present and later collectives fail at once."""
        ...


class OneByOne(Protocol):
    """Of communicators that do one thing after the other: sum first, whatever follows, and see a step to its end."""

    def all_reduce(self, x: Array) -> None: ...
    def watched(self) -> AbstractContextManager[None]: ...

    def launching(self) -> AbstractContextManager[None]:
        """Steps end where they are launched."""
        return self.watched()

    def awaiting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def all_reduce_rms_norm(
        self, ops: Backend, x_TE: Array, delta_TE: Array, weight_E: Array, eps: float, out_TE: Array
    ) -> None:
        """Two ops."""
        self.all_reduce(delta_TE)
        ops.add_rms_norm(x_TE, delta_TE, weight_E, eps, out_TE)


class LocalCommunicator(OneByOne):
    """A group of one. attended: a vigil is kept over its own process."""

    rank, size = 0, 1

    def __init__(self, attended: bool = False) -> None:
        self._attended = attended
        self._vigil: Vigil | None = None

    def all_reduce(self, x: Array) -> None:
        """Nothing to add."""

    def all_gather_cols(self, x_SN: Array, out_SN: Array, widths: tuple[int, ...]) -> None:
        """Nothing to gather: the caller passes one array as both."""
        assert x_SN is out_SN and len(widths) == 1

    def broadcast(self, x: Array, root: int = 0) -> None:
        """Nothing to send."""

    def barrier(self) -> None:
        """Everyone is here."""

    def swap(self, mine: bytes) -> list[bytes]:
        return [mine]

    def watched(self) -> AbstractContextManager[None]:
        return nullcontext() if self._vigil is None else self._vigil.step()

    def set_timeout(self, seconds: float) -> None:
        if self._attended:
            self._vigil = Vigil(0, seconds, lambda: {0: Awaited(os.getpid())}, self.abort)

    def still(self) -> float | None:
        return None if self._vigil is None else self._vigil.still(time.monotonic())

    def abort(self) -> None:
        if self._vigil is not None:
            self._vigil.stop()


class NotYetMet(LocalCommunicator):
    """Stands for a group of `size` before its ranks have met: steps can be listed, not run."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def all_gather_cols(self, x_SN: Array, out_SN: Array, widths: tuple[int, ...]) -> None:
        """Nothing is there to gather."""


class GroupCommunicator(OneByOne):
    """Ranks of one host over shared memory; the backend's kernels do the work, so a step with collectives can
    be captured as a whole."""

    def __init__(self, group: Group, backend: Backend) -> None:
        self.group, self.backend = group, backend
        self.rank, self.size = group.rank, group.size

    def all_reduce(self, x: Array) -> None:
        self.backend.all_reduce(self.group, x)

    def all_gather_cols(self, x_SN: Array, out_SN: Array, widths: tuple[int, ...]) -> None:
        self.backend.all_gather_cols(self.group, x_SN, out_SN, widths)

    def broadcast(self, x: Array, root: int = 0) -> None:
        self.backend.broadcast(self.group, x, root)

    def barrier(self) -> None:
        self.backend.barrier(self.group)

    def swap(self, mine: bytes) -> list[bytes]:
        return self.group.swap(mine)

    def watched(self) -> AbstractContextManager[None]:
        return nullcontext()

    def set_timeout(self, seconds: float) -> None:
        self.group.timeout = seconds

    def still(self) -> float | None:
        return None

    def abort(self) -> None:
        self.group.abort()


class ThreadCommunicator(GroupCommunicator):
    """Ranks that are threads of this process, over plain memory."""

    @staticmethod
    def buffer(size: int) -> np.ndarray:
        """The memory that all ranks of one group are given."""
        return np.zeros(Group.buffer_bytes(size), np.uint8)

    def __init__(self, buffer: np.ndarray, rank: int, size: int, backend: Backend, timeout: float) -> None:
        super().__init__(Group(buffer, rank, size, timeout), backend)


class SharedMemoryCommunicator(GroupCommunicator):
    """Ranks that are processes of one host, over a mapped file which has no name once all have joined, or
    the first one gave up: nothing stays behind however they die.

    Once it has a time-out it keeps a vigil over the ranks that it waits for: one that does nothing for so long is given
    up, one that is at work gets more."""

    def __init__(self, path: Path, rank: int, size: int, backend: Backend, timeout: float) -> None:
        length = Group.buffer_bytes(size)
        if rank == 0:
            _create(path, length)
        self._map = _attach(path, length, rank, timeout)
        super().__init__(Group(np.frombuffer(self._map, np.uint8), rank, size, timeout), backend)
        self.group.words[flag_index(rank) + PID] = os.getpid()
        self._vigil: Vigil | None = None
        try:
            self.barrier()
        finally:
            if rank == 0:
                path.unlink()

    def set_timeout(self, seconds: float) -> None:
        self._vigil = Vigil(self.rank, seconds, self.awaited, self.group.abort)
        self.group.timeout = PATIENCE * seconds

    def watched(self) -> AbstractContextManager[None]:
        return nullcontext() if self._vigil is None else self._vigil.step()

    def still(self) -> float | None:
        return None if self._vigil is None else self._vigil.still(time.monotonic())

    def abort(self) -> None:
        if self._vigil is not None:
            self._vigil.stop()
        self.group.abort()

    def awaited(self) -> dict[int, Awaited]:
        """The ranks that are behind this one, which it waits for; itself where none is."""
        words = self.group.words
        counts = {r: int(words[flag_index(r)]) for r in range(self.size)}
        behind = [r for r, count in counts.items() if count < counts[self.rank]] or [self.rank]
        return {r: Awaited(int(words[flag_index(r) + PID]), counts[r]) for r in behind}


def connect_processes(path: Path, rank: int, size: int, backend: Backend, timeout: float) -> Communicator:
    """Ranks that are processes of one host: through its memory, or through their GPUs'. Raises RankFailed and what the
    kernels raise where they cannot meet within `timeout` seconds."""
    meeting = SharedMemoryCommunicator(path, rank, size, backend, timeout)
    device = getattr(backend, "device", None)
    if device is None:
        return meeting
    from flm.worker.communication.comm_cuda import CudaCommunicator

    return CudaCommunicator(meeting, device, timeout)


def _create(path: Path, length: int) -> None:
    """Make the zeroed file under another name first, so that no rank can map half of it."""
    fresh = path.with_suffix(".new")
    with open(fresh, "wb") as file:
        file.truncate(length)
    os.replace(fresh, path)


def _attach(path: Path, length: int, rank: int, timeout: float) -> mmap.mmap:
    deadline = time.monotonic() + timeout
    while not path.exists():
        if time.monotonic() > deadline:
            raise RankFailed(f"rank {rank} waited {timeout:g} s for rank 0 to open the group's shared memory")
        time.sleep(0.005)
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), length)
