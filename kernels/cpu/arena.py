"""Arena: memory for weights and caches in huge pages.

A decode step reads every weight once. In pages of 4 KiB the address translation misses on each page, and inside a virtual
machine a miss walks two tables: weights in many small arrays streamed at half the speed of the same bytes in huge pages.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

HUGE = 2 << 20
BLOCK = 32 << 20  # arrays are cut from blocks of this size; untouched pages cost nothing
LINE = 64


class Arena:
    """Hands out arrays of zeros at multiples of 64 bytes. A block is freed with the last array cut from it."""

    def __init__(self) -> None:
        self._block: NDArray[np.uint8] = np.empty(0, np.uint8)

    def take(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """An array of this shape; its memory reads as zeros."""
        kind = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        room = -(-count // LINE) * LINE
        if room > BLOCK // 4:
            return huge(count)[:count].view(kind).reshape(shape)
        if room > len(self._block):
            self._block = huge(BLOCK)
        piece, self._block = self._block[:count], self._block[room:]
        return piece.view(kind).reshape(shape)


def huge(count: int) -> NDArray[np.uint8]:
    """At least `count` zero bytes from a multiple of 2 MiB on, in huge pages where the system has them. MemoryError where
    there is no room."""
    size = max(1, -(-count // HUGE)) * HUGE
    # private: Python's default is shared memory, which most systems never put into huge pages
    try:
        mapping = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"unable to map {size:,} bytes: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without transparent huge pages: slower, nothing else
            mapping.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(mapping, np.uint8)
    start = -raw.ctypes.data % HUGE
    return raw[start : start + size]
