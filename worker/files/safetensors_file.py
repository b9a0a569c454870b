"""Reader of safetensors files and sharded directories, by slices.

Format: 8 bytes little-endian length of the header, a JSON header, then the tensors' bytes
(github.com/huggingface/safetensors#format). Own parser, because NumPy knows neither bfloat16 nor float8.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flm.worker.config import Span
from flm.worker.errors import CheckpointError
from flm.worker.files.byte_file import ByteFile
from flm.worker.files.layout import layout_fault

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMS = 32  # NumPy's

# bfloat16 and float8 are given as their bits
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"), "F8_E5M2": np.dtype("u1"), "F8_E8M0": np.dtype("u1"), "BOOL": np.dtype("u1"),
    "I8": np.dtype("i1"), "U8": np.dtype("u1"), "I16": np.dtype("<i2"), "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8"), "U64": np.dtype("<u8"),
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: safetensors' name of its dtype, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TensorFile(Protocol):
    """A file of tensors, whatever its format."""

    path: Path
    tensors: dict[str, TensorEntry]

    def read(self, name: str, rows: Span | None = None, cols: Span | None = None) -> NDArray[Any]: ...
    def will_read(self, name: str, rows: Span | None = None, cols: Span | None = None) -> None: ...


class SafetensorsFile:
    """One .safetensors file. Raises CheckpointError for anything that does not add up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = ByteFile(path)
        self.tensors = self._parse()

    def read(self, name: str, rows: Span | None = None, cols: Span | None = None) -> NDArray[Any]:
        """The tensor, or its `rows` (first axis) and `cols` (second axis): only these are read.

        bfloat16 and float8 come as their bits (uint16, uint8). The caller keeps spans within the shape.
        """
        entry = self.tensors[name]
        dtype = DTYPES[entry.dtype]
        if rows is None and cols is None:
            return self._file.bytes_at(entry.offset, entry.nbytes).view(dtype).reshape(entry.shape)
        pieces = self._pieces(entry, rows, cols)
        raw = np.ascontiguousarray(self._file.rows_at(entry.offset, *pieces)).reshape(-1).view(dtype)
        width = entry.shape[1:] if cols is None else (cols.size, *entry.shape[2:])
        return raw.reshape(len(pieces[3]), *width)

    def will_read(self, name: str, rows: Span | None = None, cols: Span | None = None) -> None:
        """Begin to read what read() is going to be asked for."""
        entry = self.tensors[name]
        if entry.shape:
            self._file.will_read_rows(entry.offset, *self._pieces(entry, rows, cols))

    def _pieces(
        self, entry: TensorEntry, rows: Span | None, cols: Span | None
    ) -> tuple[int, int, int, range]:
        """What ByteFile.rows_at takes: bytes of a row, the first of them, how many of them, which rows."""
        count = entry.shape[0]
        row_bytes = entry.nbytes // max(count, 1)
        first, length = 0, row_bytes
        if cols is not None:
            each = row_bytes // max(entry.shape[1], 1)
            first, length = cols.start * each, cols.size * each
        return row_bytes, first, length, range(rows.start, rows.stop) if rows else range(count)

    def _fail(self, message: str) -> CheckpointError:
        return CheckpointError(str(self.path), message)

    def _parse(self) -> dict[str, TensorEntry]:
        size = self._file.size
        if size < 8:
            raise self._fail(f"truncated: expected at least 8 bytes, found {size}")
        length = int.from_bytes(self._file.bytes_at(0, 8).tobytes(), "little")
        if length > MAX_HEADER_BYTES:
            raise self._fail(
                f"not a safetensors file: a header of {length} bytes, at most {MAX_HEADER_BYTES} expected"
            )
        if 8 + length > size:
            raise self._fail(f"truncated in the header: expected at least {8 + length} bytes, found {size}")
        try:
            header = json.loads(self._file.bytes_at(8, length).tobytes().decode("utf-8"))
        except ValueError as error:
            raise self._fail(f"the header is not JSON: {error}") from error
        except RecursionError as error:
            raise self._fail("the header is not JSON of a safetensors file: nested too deeply") from error
        if not isinstance(header, dict):
            raise self._fail(f"the header must be a JSON object, found {type(header).__name__}")
        entries = {n: self._entry(n, raw, 8 + length) for n, raw in header.items() if n != "__metadata__"}
        places = ((name, entry.offset, entry.nbytes) for name, entry in entries.items())
        fault = layout_fault(places, 8 + length, size)
        if fault:
            raise self._fail(fault)
        return entries

    def _entry(self, name: str, raw: Any, base: int) -> TensorEntry:
        try:
            dtype, shape, (start, stop) = raw["dtype"], raw["shape"], raw["data_offsets"]
            whole = all(type(v) is int and 0 <= v < 2**63 for v in (*shape, start, stop))
        except (TypeError, KeyError, ValueError) as error:
            raise self._fail(
                f"tensor {name!r}: expected dtype, shape and two data_offsets, found {raw!r:.200}"
            ) from error
        if not whole or start > stop or len(shape) > MAX_DIMS:
            raise self._fail(
                f"tensor {name!r}: up to {MAX_DIMS} sizes and two data_offsets in order, whole numbers >= 0 and "
                f"< 2**63, expected, found {raw!r:.200}"
            )
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._fail(
                f"tensor {name!r} has unknown dtype {dtype!r}; known: {', '.join(sorted(DTYPES))}"
            )
        want = DTYPES[dtype].itemsize
        for length in shape:
            want *= length
        if stop - start != want:
            raise self._fail(
                f"tensor {name!r}: {dtype} {shape} needs {want} bytes, its data_offsets hold {stop - start}"
            )
        return TensorEntry(dtype, tuple(shape), base + start, want)


def open_safetensors(directory: Path) -> dict[str, SafetensorsFile]:
    """Tensor name → the open file that holds it, for a directory with one file or an index of several."""
    index = directory / INDEX_NAME
    if index.is_file():
        return _open_sharded(directory, index)
    single = directory / "model.safetensors"
    if not single.is_file():
        others = sorted(p.name for p in directory.glob("*.safetensors"))
        if not others and (why := why_pickles(directory)):
            raise CheckpointError(str(directory), why)
        if len(others) != 1:
            found = ", ".join(others) or "none"
            raise CheckpointError(
                str(directory), f"expected model.safetensors or {INDEX_NAME}; .safetensors files: {found}"
            )
        single = directory / others[0]
    file = SafetensorsFile(single)
    return dict.fromkeys(file.tensors, file)


def why_pickles(directory: Path) -> str:
    """Why the pickles in a directory are not loaded, and what reads them; "" where it holds none."""
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if not pickles:
        return ""
    return (
        f"holds weights as pickles ({pickles[0]}), which are programs and are never loaded; "
        f"`flm-cluster convert {directory} NEW_DIRECTORY` reads them safely and writes safetensors"
    )


def _open_sharded(directory: Path, index: Path) -> dict[str, SafetensorsFile]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = sorted((str(name), weight_map[name]) for name in weight_map)
    except (ValueError, LookupError, TypeError, RecursionError, OSError) as error:
        raise CheckpointError(
            str(index), f"expected a JSON object with weight_map (tensor to file): {error!r:.200}"
        ) from error
    files: dict[str, SafetensorsFile] = {}
    tensors: dict[str, SafetensorsFile] = {}
    for name, file_name in pairs:
        # only files beside the index: a checkpoint must not reach into other folders
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(
                str(index), f"tensor {name!r}: expected the name of a file beside it, found {file_name!r}"
            )
        if file_name not in files:
            if not (directory / file_name).is_file():
                raise CheckpointError(
                    str(index), f"names {file_name!r} (tensor {name!r}), which is not in the directory"
                )
            files[file_name] = SafetensorsFile(directory / file_name)
        if name not in files[file_name].tensors:
            raise CheckpointError(
                str(index), f"says tensor {name!r} is in {file_name!r}, which does not hold it"
            )
        tensors[name] = files[file_name]
    return tensors
