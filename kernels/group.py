"""Group: the memory through which ranks of one host exchange arrays.

One flat buffer, zeroed before any rank uses it, shared by all ranks (multiprocessing.shared_memory for processes, plain
memory for threads). Layout, in cache lines of 64 bytes: the abort flag; one line per rank with its arrival counter and
its own count of exchanges; then two data slots per rank, used in turn.

An exchange: write your data to your slot, publish your counter, wait for every counter, read all slots. The slots
alternate, and a rank publishes exchange e + 1 only after it has read those of e, so no slot is overwritten while read.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.errors import CollectiveAborted, CollectiveTimeout, ShapeError

LINE = 64
ABORT = 0  # int64 index of the abort flag


def flag_index(rank: int) -> int:
    """int64 index of a rank's arrival counter; its private count of exchanges is the next word."""
    return (1 + rank) * (LINE // 8)


class Group:
    """One rank's view of the shared buffer. timeout: seconds that any single wait may last."""

    def __init__(self, buffer: NDArray[np.uint8], rank: int, size: int, timeout: float = 10.0) -> None:
        if not 0 <= rank < size <= 64:
            raise ShapeError(f"a rank below a size of at most 64 expected, got rank {rank} of {size}")
        if buffer.ndim != 1 or buffer.dtype != np.uint8 or len(buffer) < Group.buffer_bytes(size, LINE):
            raise ShapeError(
                f"a flat uint8 buffer of at least {Group.buffer_bytes(size, LINE)} bytes expected for {size} ranks, "
                f"got {buffer.dtype} {buffer.shape}"
            )
        self.buffer, self.rank, self.size, self.timeout = buffer, rank, size, float(timeout)
        self.data_start = (1 + size) * LINE
        self.slot_bytes = (len(buffer) - self.data_start) // (2 * size) // LINE * LINE
        self.words = buffer[: self.data_start].view(np.int64)

    @staticmethod
    def buffer_bytes(size: int, slot_bytes: int = 1 << 18) -> int:
        """Bytes to allocate for `size` ranks with messages of `slot_bytes` a piece; longer ones go in pieces."""
        return (1 + size) * LINE + 2 * size * (-(-slot_bytes // LINE) * LINE)

    def abort(self) -> None:
        """Make every rank's present and future collectives raise CollectiveAborted."""
        self.words[ABORT] = 1

    @property
    def aborted(self) -> bool:
        return bool(self.words[ABORT])

    def slot(self, rank: int, epoch: int) -> NDArray[np.uint8]:
        """The slot that `rank` fills in exchange `epoch`."""
        start = self.data_start + (2 * rank + epoch % 2) * self.slot_bytes
        return self.buffer[start : start + self.slot_bytes]

    def swap(self, mine: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order; at most slot_bytes - 8 of each."""
        piece = np.frombuffer(len(mine).to_bytes(8, "little") + mine, np.uint8)
        if len(piece) > self.slot_bytes:
            raise ShapeError(f"at most {self.slot_bytes - 8} bytes expected, got {len(mine)}")
        epoch = self.exchange(piece)
        slots = [self.slot(rank, epoch).tobytes() for rank in range(self.size)]
        return [slot[8 : 8 + int.from_bytes(slot[:8], "little")] for slot in slots]

    def exchange(self, piece: NDArray[Any]) -> int:
        """Publish up to slot_bytes of data, wait for all ranks, return the epoch whose slots can now be read.

        The plain Python form, used by the reference backend; it interoperates with the compiled one.
        """
        mine = flag_index(self.rank)
        epoch = int(self.words[mine + 1]) + 1
        data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        self.slot(self.rank, epoch)[: len(data)] = data
        self.words[mine + 1] = epoch
        self.words[mine] = epoch
        deadline = time.monotonic() + self.timeout
        while True:
            if self.aborted:
                raise CollectiveAborted(self.rank)
            missing = [r for r in range(self.size) if self.words[flag_index(r)] < epoch]
            if not missing:
                return epoch
            if time.monotonic() > deadline:
                raise CollectiveTimeout(self.rank, missing, self.timeout)
            time.sleep(0)
