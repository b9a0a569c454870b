"""A read-only memory map with exact bounds: what checkpoints are read from."""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flm.worker.errors import CheckpointError

_LFS = b"version https://git-lfs"  # how what stands for a file begins that was cloned without its contents
REQUEST = 128 << 10  # the least that systems read at once when they are told of a range


class MappedFile:
    """The bytes of one file. Pages are read when they are told of or touched, and `drop_pages` gives them back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._exact = False
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._handle)
            self.size = os.fstat(self._handle).st_size
            if self.size == 0:
                raise CheckpointError(str(path), "the file is empty")
            self.data = mmap.mmap(self._handle, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(str(path), f"cannot be read: {error.strerror or error}") from error
        if self.data[: len(_LFS)] == _LFS:
            raise CheckpointError(
                str(path), "is a Git LFS pointer, not the file; `git lfs pull` fetches that"
            )

    def bytes_at(self, offset: int, length: int) -> NDArray[np.uint8]:
        """A view of `length` bytes from `offset` on."""
        return np.frombuffer(self.data, np.uint8, length, offset)

    def will_read(self, offset: int, length: int) -> None:
        """Begin to read a range from the disk, and from now on nothing that no one speaks of: readahead would fetch what
        belongs to other ranks."""
        if not self._exact:
            self.data.madvise(mmap.MADV_RANDOM)
            self._exact = True
        for start in range(offset, offset + length, REQUEST):
            size = min(REQUEST, offset + length - start)
            os.posix_fadvise(self._handle, start, size, os.POSIX_FADV_WILLNEED)

    def will_read_rows(self, offset: int, row_bytes: int, first: int, length: int, rows: range) -> None:
        """As will_read, `length` bytes from `first` on of each of those rows. Gaps of less than a page are read too."""
        if row_bytes - length < mmap.PAGESIZE:
            self.will_read(offset + rows.start * row_bytes, len(rows) * row_bytes)
            return
        for row in rows:
            self.will_read(offset + row * row_bytes + first, length)

    def drop_pages(self) -> None:
        """Take this map's pages out of the resident set; views stay valid and read the file again."""
        self.data.madvise(mmap.MADV_DONTNEED)
