"""A writer of safetensors files for tests, which also takes dtypes that NumPy does not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMES = {
    "float32": "F32",
    "float16": "F16",
    "int32": "I32",
    "int64": "I64",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "BF16",
}


def write_safetensors(
    path: Path, tensors: dict[str, NDArray[Any]], dtypes: dict[str, str] | None = None
) -> Path:
    """dtypes: names of safetensors' dtypes where they do not follow from the array; uint16 means bfloat16."""
    header: dict[str, Any] = {}
    at = 0
    for name, values in tensors.items():
        kind = (dtypes or {}).get(name) or NAMES[values.dtype.name]
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    text = json.dumps(header).encode()
    body = b"".join(np.ascontiguousarray(values).tobytes() for values in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path
