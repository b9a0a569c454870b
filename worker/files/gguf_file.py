"""Reader of GGUF files, by slices. Own parser: every rank opens the file, and token arrays are only walked, not decoded.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.gguf_blocks import BLOCK_TYPES, TYPE_NUMBERS
from flm.worker.config import Span
from flm.worker.errors import CheckpointError
from flm.worker.files.byte_file import ByteFile
from flm.worker.files.layout import layout_fault

_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"), 10: np.dtype("<u8"), 11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
# types of ggml that these kernels do not read, only to name them in errors
_OTHER_TYPES = {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
                21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}  # fmt: skip
_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_DIMS = 4
HEADER_READ = 1 << 20  # bytes at first; files with a vocabulary have more
LARGEST_HEADER = 512 << 20
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor. `shape` is row-major (the file lists it fastest first); a row is cut into blocks of `block`
    weights that take `block_bytes`."""

    type: str
    shape: tuple[int, ...]
    block: int
    block_bytes: int
    offset: int  # from the start of the file
    nbytes: int


@dataclass(frozen=True)
class _StringArray:
    """Where an array of strings lies; decoded when asked for."""

    start: int
    count: int


class GGUFFile:
    """One .gguf file, or the first of several that hold one model (NAME-00001-of-0000N.gguf), whose tensors
    are then its own. Raises CheckpointError for anything that does not add up."""

    def __init__(self, path: Path, part: int = 1) -> None:
        self.path = path
        self._file = ByteFile(path)
        self._raw: dict[str, Any] = {}
        self._head, self._at = b"", 0
        self.tensors = self._parse_as_much_as_needed()
        self._owners = self._other_parts(part)

    def __contains__(self, key: str) -> bool:
        return key in self._raw

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata value of `key`: int, float, bool, str, or a list of these."""
        value = self._raw.get(key, default)
        return list(self._strings(key, value)) if isinstance(value, _StringArray) else value

    def keys_under(self, prefix: str) -> list[str]:
        return [key for key in self._raw if key.startswith(prefix)]

    def read(self, name: str, rows: Span | None = None, cols: Span | None = None) -> NDArray[np.uint8]:
        """Bytes [rows, blocks, bytes per block] of a matrix (a vector has one row), and only these are read.

        `cols` must begin and end on block borders, or end at the matrix' last column.
        """
        if name in self._owners:
            return self._owners[name].read(name, rows, cols)
        tensor = self.tensors[name]
        pieces = _pieces(tensor, rows, cols)
        raw = self._file.rows_at(tensor.offset, *pieces)
        return np.ascontiguousarray(raw).reshape(
            len(pieces[3]), pieces[2] // tensor.block_bytes, tensor.block_bytes
        )

    def will_read(self, name: str, rows: Span | None = None, cols: Span | None = None) -> None:
        """Begin to read what read() is going to be asked for."""
        if name in self._owners:
            self._owners[name].will_read(name, rows, cols)
            return
        tensor = self.tensors[name]
        self._file.will_read_rows(tensor.offset, *_pieces(tensor, rows, cols))

    def _other_parts(self, part: int) -> dict[str, GGUFFile]:
        """Tensor → file, of the other files of a split model; their tensors join this file's."""
        count, number = self._raw.get("split.count", 1), self._raw.get("split.no", 0)
        if type(count) is not int or count < 1:
            raise self._fail(f"split.count: a whole number of files expected, found {count!r}")
        if number != part - 1:
            raise self._fail(f"is number {number} (from 0) of {count} files; give the first, 00001")
        ending = f"-00001-of-{count:05d}.gguf"
        if count <= 1 or part > 1:
            return {}
        if not self.path.name.endswith(ending):
            raise self._fail(f"is the first of {count} files: a name that ends with {ending!r} expected")
        stem, owners = self.path.name.removesuffix(ending), dict[str, GGUFFile]()
        for other in range(2, count + 1):
            file = GGUFFile(self.path.with_name(f"{stem}-{other:05d}-of-{count:05d}.gguf"), other)
            owners |= dict.fromkeys(file.tensors, file)
            self.tensors |= file.tensors
        expected = self._raw.get("split.tensors.count", len(self.tensors))
        if len(self.tensors) != expected:
            raise self._fail(f"{expected} tensors in {count} files expected, found {len(self.tensors)}")
        return owners

    def _fail(self, message: str) -> CheckpointError:
        return CheckpointError(str(self.path), message)

    def _truncated(self) -> CheckpointError:
        return self._fail(f"truncated or corrupt: the header goes beyond the file's {self._file.size} bytes")

    # -------------------------------------------------------------------------------------- header

    def _parse_as_much_as_needed(self) -> dict[str, GGUFTensor]:
        """The header does not say how long it is."""
        room = HEADER_READ
        while True:
            self._head = self._file.bytes_at(0, min(room, self._file.size)).tobytes()
            self._raw, self._at = {}, 0
            try:
                tensors = self._parse()
            except (struct.error, IndexError, OverflowError) as error:
                # a length near 2**64 leads to a place that no index can name
                if len(self._head) == self._file.size or room >= LARGEST_HEADER:
                    raise self._truncated() from error
                room *= 8
                continue
            self._head = self._head[: self._at]
            return tensors

    def _take(self, length: int) -> bytes:
        """The next bytes of the header. IndexError where they have not been read."""
        start, self._at = self._at, self._at + length
        if self._at > self._file.size:
            raise self._truncated()
        if self._at > len(self._head):
            raise IndexError
        return self._head[start : self._at]

    def _parse(self) -> dict[str, GGUFTensor]:
        magic = self._head[:4]
        if magic != b"GGUF":
            raise self._fail(f"not a GGUF file: expected it to begin with b'GGUF', found {magic!r}")
        self._at = 4
        version = self._number("<I")
        if version not in (2, 3):
            raise self._fail(f"GGUF version 2 or 3 (little-endian) expected, found {version}")
        tensor_count, field_count = self._number("<Q"), self._number("<Q")
        # a field takes at least 13 bytes and a tensor 24: refuse absurd counts before looping over them
        if field_count * 13 + tensor_count * 24 > self._file.size:
            raise self._truncated()
        for _ in range(field_count):
            key = self._string()
            self._raw[key] = self._value(self._number("<I"), key)
        infos = [self._tensor_info() for _ in range(tensor_count)]
        return self._placed(infos)

    def _number(self, code: str) -> int:
        (value,) = struct.unpack_from(code, self._head, self._at)
        self._at += struct.calcsize(code)
        return int(value)

    def _string(self) -> str:
        length = self._number("<Q")
        raw = self._take(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._fail(f"corrupt: a name or value at byte {self._at - length} is not UTF-8") from error

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(key)
        return self._scalars(kind, 1, key)[0].item()

    def _array(self, key: str) -> Any:
        kind, count = self._number("<I"), self._number("<Q")
        if kind == _STRING:
            start = self._at
            self._skip_strings(count)
            return _StringArray(start, count)
        if kind == _ARRAY:
            raise self._fail(f"metadata {key!r}: an array of arrays, which no supported model has")
        return self._scalars(kind, count, key).tolist()

    def _scalars(self, kind: int, count: int, key: str) -> NDArray[Any]:
        if kind not in _SCALARS:
            raise self._fail(f"metadata {key!r} has unknown value type {kind}; known: 0 to 12")
        return np.frombuffer(self._take(count * _SCALARS[kind].itemsize), _SCALARS[kind])

    def _skip_strings(self, count: int) -> None:
        if self._at + count * 8 > self._file.size:
            raise self._truncated()
        data, at, unpack = self._head, self._at, _U64.unpack_from
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        if at > self._file.size:
            raise self._truncated()
        if at > len(data):
            raise IndexError
        self._at = at

    def _strings(self, key: str, array: _StringArray) -> Iterator[str]:
        data, at, unpack = self._head, array.start, _U64.unpack_from
        try:
            for _ in range(array.count):
                (length,) = unpack(data, at)
                yield data[at + 8 : at + 8 + length].decode("utf-8")
                at += 8 + length
        except UnicodeDecodeError as error:
            raise self._fail(f"corrupt: an entry of {key!r} at byte {at} is not UTF-8") from error

    # ------------------------------------------------------------------------------------- tensors

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dims = self._string(), self._number("<I")
        if not 1 <= dims <= _MAX_DIMS:
            raise self._fail(f"tensor {name!r}: 1 to {_MAX_DIMS} dimensions expected, found {dims}")
        shape = tuple(self._number("<Q") for _ in range(dims))[::-1]
        return name, shape, self._number("<I"), self._number("<Q")

    def _placed(self, infos: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, GGUFTensor]:
        align = self._raw.get("general.alignment", 32)
        if not isinstance(align, int) or align <= 0:
            raise self._fail(f"general.alignment: a whole number > 0 expected, found {align!r}")
        base = -(-self._at // align) * align
        tensors = {
            name: self._tensor(name, shape, kind, base + offset) for name, shape, kind, offset in infos
        }
        fault = layout_fault(
            ((name, tensor.offset, tensor.nbytes) for name, tensor in tensors.items()), base, self._file.size
        )
        if fault:
            raise self._fail(fault)
        return tensors

    def _tensor(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> GGUFTensor:
        kind = TYPE_NUMBERS.get(number)
        if kind is None:
            known = ", ".join(TYPE_NUMBERS.values())
            label = _OTHER_TYPES.get(number, f"number {number}")
            raise self._fail(
                f"tensor {name!r} has GGML type {label}, which is not supported; supported: {known}"
            )
        block, size = (1, _FLOAT_BYTES[kind]) if kind in _FLOAT_BYTES else BLOCK_TYPES[kind][:2]
        if 0 in shape or shape[-1] % block:
            raise self._fail(
                f"tensor {name!r}: {kind} needs rows of a multiple of {block}, found shape {list(shape)}"
            )
        nbytes = prod(shape) // block * size
        return GGUFTensor(kind, shape, block, size, offset, nbytes)


def _pieces(tensor: GGUFTensor, rows: Span | None, cols: Span | None) -> tuple[int, int, int, range]:
    """What ByteFile.rows_at takes: bytes of a row, the first of them, how many of them, which rows."""
    blocks = tensor.shape[-1] // tensor.block
    count, cols = prod(tensor.shape[:-1]), cols or Span(0, tensor.shape[-1])
    assert cols.start % tensor.block == 0 and cols.stop % tensor.block == 0
    held = Span(cols.start // tensor.block, cols.stop // tensor.block).scaled(tensor.block_bytes)
    return (
        blocks * tensor.block_bytes,
        held.start,
        held.size,
        range(rows.start, rows.stop) if rows else range(count),
    )
