"""Writer of one safetensors file, tensor by tensor, so that no more than one is in memory.

Room for the header is kept at the front and filled at the end; the format allows spaces after its JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

HEADER_PER_TENSOR = 256  # bytes kept for each beside its name: dtype, shape and two offsets
ALIGNMENT = 64  # of the first tensor


class SafetensorsWriter:
    """Writes `path`. `names`: every tensor that may be added, in any order. The file is complete, and on the disk, once the
    `with` block is left without an error."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self.path = path
        self._room = sum(len(json.dumps(name)) + HEADER_PER_TENSOR for name in names) + 64
        self._room += -(self._room + 8) % ALIGNMENT
        self._header: dict[str, Any] = {}
        self._file = path.open("xb")
        self._file.seek(8 + self._room)
        self._at = 0

    @property
    def tensors(self) -> list[str]:
        """Names of those added so far."""
        return list(self._header)

    def add(self, name: str, dtype: str, values: NDArray[Any]) -> None:
        """Append a tensor under safetensors' name of its dtype; bfloat16 and float8 come as their bits."""
        self.add_rows(name, dtype, [values])

    def add_rows(self, name: str, dtype: str, pieces: Iterable[NDArray[Any]]) -> None:
        """As add, of at least one piece of a tensor after the other."""
        assert name not in self._header, name
        start, rows, shape = self._at, 0, tuple[int, ...]()
        for piece in pieces:
            flat = np.ascontiguousarray(piece)
            self._file.write(flat.reshape(-1).view(np.uint8).data)
            self._at += flat.nbytes
            shape = piece.shape
            rows += shape[0] if shape else 0
        whole = [rows, *shape[1:]] if shape else []
        self._header[name] = {"dtype": dtype, "shape": whole, "data_offsets": [start, self._at]}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is not None:
                return
            text = json.dumps(self._header).encode()
            assert len(text) <= self._room, (len(text), self._room)
            self._file.seek(0)
            self._file.write(self._room.to_bytes(8, "little") + text + b" " * (self._room - len(text)))
            self._file.flush()
            os.fsync(self._file.fileno())
