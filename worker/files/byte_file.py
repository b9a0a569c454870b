"""The bytes of one checkpoint file, with exact bounds.

Read with pread, never through a memory map: a file that somebody cuts short, or a disk that fails, is an error of that read
and not a signal that ends the process, and what is asked for is what is copied.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread

import numpy as np
from numpy.typing import NDArray

from flm.worker.errors import CheckpointError

_LFS = b"version https://git-lfs"  # how what stands for a file begins that was cloned without its contents
REQUEST = 128 << 10  # the least that systems read at once when they are told of a range
SHORT_PIECE = 128  # bytes of a row below which the gap is read too: a call takes longer than the copy
MOST_OF_GAPS = 4  # unless that would be more than so many times the bytes
NARROW_GAP = 64 << 10  # bytes between pieces of rows that the disk reads too: another rank wants them


class ByteFile:
    """One file, open for reading; several threads may read. Raises CheckpointError for what cannot be read, and where the
    file is no longer the one that was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._ahead = _ReadAhead(self._handle)
            found = os.fstat(self._handle)
        except OSError as error:
            raise self._unreadable(error) from error
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(str(path), "cannot be read: a regular file expected")
        self.size, self._changed_at = found.st_size, found.st_mtime_ns
        if self.size == 0:
            raise CheckpointError(str(path), "the file is empty")
        if self.bytes_at(0, min(len(_LFS), self.size)).tobytes() == _LFS:
            raise CheckpointError(
                str(path), "is a Git LFS pointer, not the file; `git lfs pull` fetches that"
            )
        if hasattr(os, "posix_fadvise"):  # nothing that no one asks for: it may belong to other ranks
            os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_RANDOM)

    def bytes_at(self, offset: int, length: int) -> NDArray[np.uint8]:
        """`length` bytes from `offset` on."""
        out = np.empty(length, np.uint8)
        self._fill(out, offset)
        self._check_unchanged()
        return out

    def rows_at(self, offset: int, row_bytes: int, first: int, length: int, rows: range) -> NDArray[np.uint8]:
        """[rows, length]: `length` bytes from `first` on of each of those rows of `row_bytes`, the first at `offset`."""
        start, count = offset + rows.start * row_bytes, len(rows)
        if length == row_bytes or (length < SHORT_PIECE and row_bytes <= MOST_OF_GAPS * length):
            return self.bytes_at(start, count * row_bytes).reshape(count, row_bytes)[
                :, first : first + length
            ]
        out = np.empty((count, length), np.uint8)
        for i in range(count):
            self._fill(out[i], start + i * row_bytes + first)
        self._check_unchanged()
        return out

    def will_read(self, offset: int, length: int) -> None:
        """Begin to read a range from the disk, on another thread."""
        self._ahead.add([(offset, length)])

    def will_read_rows(self, offset: int, row_bytes: int, first: int, length: int, rows: range) -> None:
        """As will_read, of pieces of rows as rows_at reads them. Narrow gaps are read too: other ranks of this machine want
        what lies there, and each begins at another place, so that the disk reads everything once."""
        if row_bytes - length > NARROW_GAP:
            self._ahead.add((offset + row * row_bytes + first, length) for row in rows)
            return
        middle = rows.start + len(rows) * first // max(row_bytes, 1)
        for a, b in ((middle, rows.stop), (rows.start, middle)):
            self._ahead.add([(offset + a * row_bytes, (b - a) * row_bytes)])

    def _fill(self, out: NDArray[np.uint8], offset: int) -> None:
        view, at = out.data, 0
        try:
            while at < len(view):
                got = os.preadv(self._handle, [view[at:]], offset + at)
                if got == 0:
                    raise CheckpointError(
                        str(self.path),
                        f"cut short while it was read: {self.size} bytes when it was opened, no more than "
                        f"{offset + at} now",
                    )
                at += got
        except OSError as error:
            raise self._unreadable(error) from error

    def _check_unchanged(self) -> None:
        now = os.fstat(self._handle)
        if (now.st_size, now.st_mtime_ns) != (self.size, self._changed_at):
            raise CheckpointError(
                str(self.path),
                f"written to while it was read: {self.size} bytes when it was opened, {now.st_size} now",
            )

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(str(self.path), f"cannot be read: {error.strerror or error}")


class _ReadAhead:
    """Tells the system of ranges, one after the other, on a thread that lives while there are any: to be told takes as long as
    to find memory for what is read, and waits while the disk has enough to do. Closes the file once nobody needs it."""

    def __init__(self, handle: int) -> None:
        self._handle, self._lock = handle, Lock()
        weakref.finalize(self, os.close, handle)
        self._ranges: deque[tuple[int, int]] = deque()
        self._running = False

    def add(self, ranges: Iterable[tuple[int, int]]) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        with self._lock:
            self._ranges.extend(ranges)
            if self._running or not self._ranges:
                return
            self._running = True
        Thread(target=self._run, name="read ahead", daemon=True).start()

    def _run(self) -> None:
        while (found := self._next()) is not None:
            offset, length = found
            for start in range(offset, offset + length, REQUEST):
                size = min(REQUEST, offset + length - start)
                with suppress(OSError):  # only a hint; who reads the range meets the error
                    os.posix_fadvise(self._handle, start, size, os.POSIX_FADV_WILLNEED)

    def _next(self) -> tuple[int, int] | None:
        with self._lock:
            if self._ranges:
                return self._ranges.popleft()
            self._running = False
            return None
