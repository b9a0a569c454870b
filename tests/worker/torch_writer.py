"""PyTorch's zip checkpoints for tests, written opcode by opcode, so that neither torch nor its classes are needed."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

STORAGES = {
    "float32": "Float",
    "float16": "Half",
    "uint16": "BFloat16",
    "int32": "Int",
    "int8": "Char",
    "int64": "Long",
}
STOP = b"."


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    storage: str, key: str, count: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> bytes:
    """_rebuild_tensor_v2(storage, offset, shape, strides, False, OrderedDict())."""
    reference = b"(" + text("storage") + f"ctorch\n{storage}Storage\n".encode() + text(key) + text("cpu")
    reference += number(count) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + reference + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + hooks + b"tR"
    )  # fmt: skip


def state(items: dict[str, bytes]) -> bytes:
    """A whole pickle: an OrderedDict of already written values."""
    body = b"".join(text(name) + value for name, value in items.items())
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + body + b"u" + STOP


def write_archive(
    path: Path, pickled: bytes, data: dict[str, bytes], compression: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, raw in data.items():
            archive.writestr(f"archive/data/{key}", raw)
        archive.writestr("archive/version", "3\n")
    return path


def write_torch(path: Path, tensors: dict[str, NDArray[Any]]) -> Path:
    """Every tensor in a storage of its own; uint16 means bfloat16."""
    items, data = {}, {}
    for i, (name, values) in enumerate(tensors.items()):
        strides = tuple(step // values.itemsize for step in np.array(values, order="C").strides)
        items[name] = tensor(STORAGES[values.dtype.name], str(i), values.size, 0, values.shape, strides)
        data[str(i)] = values.tobytes()
    return write_archive(path, state(items), data)


def write_torch_directory(
    target: Path, tensors: dict[str, NDArray[Any]], config: dict[str, Any], files: int = 1
) -> Path:
    """A directory as Hugging Face wrote it before safetensors."""
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    names = [f"pytorch_model-{i + 1:05d}-of-{files:05d}.bin" for i in range(files)]
    if files == 1:
        write_torch(target / "pytorch_model.bin", tensors)
        return target
    parts = [dict(list(tensors.items())[i::files]) for i in range(files)]
    for name, part in zip(names, parts, strict=True):
        write_torch(target / name, part)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target
