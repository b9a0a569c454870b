"""A read-only memory map with exact bounds: what checkpoints are read from."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flm.worker.errors import CheckpointError


class MappedFile:
    """The bytes of one file. Pages are read when touched, and `drop_pages` gives them back to the system."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size == 0:
                    raise CheckpointError(str(path), "the file is empty")
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(str(path), f"cannot be read: {error.strerror or error}") from error

    def bytes_at(self, offset: int, length: int) -> NDArray[np.uint8]:
        """A view of `length` bytes from `offset` on."""
        return np.frombuffer(self.data, np.uint8, length, offset)

    def drop_pages(self) -> None:
        """Take this map's pages out of the resident set; views stay valid and read the file again."""
        self.data.madvise(mmap.MADV_DONTNEED)
