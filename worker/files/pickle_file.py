"""Tensors of PyTorch's .bin, .pt and .pth files, for conversion only: a server never opens them.

A pickle is a program. Here it may call nothing but this file's own stand-ins for torch's tensor constructors, and what it
makes are descriptions of tensors; their bytes are read from the zip archive when asked for. Format: a zip archive with
stored members data.pkl and data/KEY (pytorch/torch/serialization.py). Files of before PyTorch 1.6 are refused by name.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.worker.config import Span
from flm.worker.errors import CheckpointError
from flm.worker.files.byte_file import ByteFile
from flm.worker.files.safetensors_file import DTYPES, TensorEntry

MAX_PICKLE_BYTES = 256 << 20
INDEX_NAME = "pytorch_model.bin.index.json"
_HEADER = 30  # bytes of a zip member's local header, before its name and extra field

# torch's storage type → safetensors' dtype
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class _StorageType:
    dtype: str


@dataclass(frozen=True)
class _Stored:
    """A storage of the archive: its dtype, its key and how many elements it has."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class _View:
    """A view of a storage, in elements."""

    stored: _Stored
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(stored: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _View:
    numbers = (offset, *shape, *strides)
    if not isinstance(stored, _Stored) or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor of something that is no storage")
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise pickle.UnpicklingError(f"a tensor of shape {shape!r} with strides {strides!r} at {offset!r}")
    last = offset + sum((length - 1) * step for length, step in zip(shape, strides, strict=True))
    if prod(shape) and last >= stored.count:
        raise pickle.UnpicklingError(f"a tensor that ends at element {last} of a storage of {stored.count}")
    return _View(stored, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


_ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
} | {("torch", name): _StorageType(dtype) for name, dtype in STORAGES.items()}


class _Unpickler(pickle.Unpickler):
    """Finds only what is in _ALLOWED, and never imports."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Stored:
        if (
            not isinstance(pid, tuple)
            or len(pid) != 5
            or pid[0] != "storage"
            or not isinstance(pid[1], _StorageType)
        ):
            raise pickle.UnpicklingError(f"an unknown reference {pid!r:.80}")
        return _Stored(pid[1].dtype, str(pid[2]), int(pid[4]))


class PickleFile:
    """One .bin file's tensors, read as SafetensorsFile reads its own. Raises CheckpointError for whatever is no plain
    dictionary of tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = ByteFile(path)
        if not zipfile.is_zipfile(path):
            raise self._fail(
                "is no zip archive, as torch.save writes since PyTorch 1.6; load it with an older torch and save it again"
            )
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = {info.filename: info for info in archive.infolist()}
                self._prefix, state = self._unpickled(archive)
        except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, ValueError, TypeError) as error:
            raise self._fail(f"is not a checkpoint of tensors only: {error}") from error
        except (AttributeError, IndexError, KeyError, ImportError, OverflowError, RecursionError) as error:
            raise self._fail(f"is not a checkpoint of tensors only: {error!r}") from error
        self._views = self._named(state)
        self.tensors = {name: self._entry(name, view) for name, view in self._views.items()}

    def _unpickled(self, archive: zipfile.ZipFile) -> tuple[str, Any]:
        found = [name for name in self._members if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(found) != 1 or self._members[found[0]].file_size > MAX_PICKLE_BYTES:
            raise pickle.UnpicklingError(
                f"one data.pkl of at most {MAX_PICKLE_BYTES} bytes expected, found {found}"
            )
        state = _Unpickler(BytesIO(archive.read(found[0])), encoding="utf-8").load()
        return found[0].removesuffix("data.pkl"), state

    def _named(self, state: Any) -> dict[str, _View]:
        for wrapper in ("state_dict", "model", "module"):
            if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
                state = state[wrapper]
        if not isinstance(state, dict):
            raise self._fail(f"a dictionary of tensors expected, found {type(state).__name__}")
        other = [str(name) for name, value in state.items() if not isinstance(value, _View)]
        if other:
            raise self._fail(f"a dictionary of tensors expected; no tensors: {', '.join(other[:3])}")
        return {str(name): value for name, value in state.items()}

    def _entry(self, name: str, view: _View) -> TensorEntry:
        """Checks that the bytes of the view's storage are there."""
        stored, member = view.stored, self._members.get(f"{self._prefix}data/{view.stored.key}")
        if member is None or member.compress_type != zipfile.ZIP_STORED:
            raise self._fail(f"tensor {name!r}: its data/{stored.key} is missing or compressed")
        header = self._file.bytes_at(member.header_offset, _HEADER)
        lengths = header[26:30].view("<u2")  # of the member's name and of its extra field
        start, width = member.header_offset + _HEADER + int(lengths.sum()), DTYPES[stored.dtype].itemsize
        needed = stored.count * width
        if member.file_size < needed or start + needed > self._file.size:
            raise self._fail(f"tensor {name!r}: {needed} bytes expected, found {member.file_size}")
        return TensorEntry(stored.dtype, view.shape, start, prod(view.shape) * width)

    def read(self, name: str, rows: Span | None = None, cols: Span | None = None) -> NDArray[Any]:
        """The tensor, or its rows and columns; bfloat16 as its bits."""
        view, entry = self._views[name], self.tensors[name]
        dtype, shape, first = DTYPES[entry.dtype], view.shape, view.offset
        if rows is not None:
            shape, first = (rows.size, *shape[1:]), first + rows.start * view.strides[0]
        reach = sum((length - 1) * step for length, step in zip(shape, view.strides, strict=True)) + 1
        count = reach if prod(shape) else 0
        flat = self._file.bytes_at(entry.offset + first * dtype.itemsize, count * dtype.itemsize).view(dtype)
        steps = tuple(step * dtype.itemsize for step in view.strides)
        whole = np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)
        return whole if cols is None else whole[:, cols.start : cols.stop]

    def will_read(self, name: str, rows: Span | None = None, cols: Span | None = None) -> None:
        """Begin to read the whole tensor."""
        self._file.will_read(self.tensors[name].offset, self.tensors[name].nbytes)

    def _fail(self, message: str) -> CheckpointError:
        return CheckpointError(str(self.path), message)


def open_pickle_files(directory: Path) -> dict[str, PickleFile]:
    """Tensor name → the open file that holds it."""
    tensors: dict[str, PickleFile] = {}
    for path in pickle_files(directory):
        file = PickleFile(path)
        tensors |= dict.fromkeys(file.tensors, file)
    if not tensors:
        raise CheckpointError(
            str(directory), "holds no weights: no *.safetensors, *.bin, *.pt or *.pth with tensors"
        )
    return tensors


def pickle_files(directory: Path) -> list[Path]:
    """The files of the directory's index, or all that look like PyTorch's weights."""
    index = directory / INDEX_NAME
    if index.is_file():
        try:
            names = {Path(str(name)).name for name in json.loads(index.read_text())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(str(index), f"expected a JSON object with weight_map: {error!r}") from error
        return [directory / name for name in sorted(names)]
    found = [path for ending in ("*.bin", "*.pt", "*.pth") for path in directory.glob(ending)]
    return sorted(
        path for path in found if path.name not in ("training_args.bin", "optimizer.bin", "scheduler.bin")
    )
