"""Checks that wrappers make before they hand an array to a kernel, which could not make them."""

from __future__ import annotations

from functools import cache
from typing import Any

from flm.kernels.errors import DTypeError, ShapeError

Array = Any
ACTIVATIONS = ("float16", "bfloat16")


@cache
def dtype_name(dtype: Any) -> str:
    """NumPy makes a dtype's name anew whenever it is asked for, which takes longer than all else of a check."""
    return str(dtype.name)


def check(name: str, array: Array, shape: tuple[int, ...], *dtypes: str) -> str:
    """The dtype's name of an array with this shape, one of these dtypes, C-contiguous; else ShapeError, DTypeError."""
    dtype = dtype_name(array.dtype)
    if dtype not in dtypes:
        raise DTypeError(f"{name}: {' or '.join(dtypes)} expected, got {dtype}")
    if array.shape != shape or not array.flags.c_contiguous:
        layout = "" if array.flags.c_contiguous else ", not C-contiguous"
        raise ShapeError(f"{name}: {shape} expected, got {tuple(array.shape)}{layout}")
    return dtype


def dimensions(name: str, array: Array, count: int) -> tuple[int, ...]:
    """The shape of an array that must have `count` dimensions."""
    if array.ndim != count:
        raise ShapeError(f"{name}: {count} dimensions expected, got shape {tuple(array.shape)}")
    return tuple(array.shape)


def address_of(array: Array) -> int:
    """Where an array lies: CuPy's, or that of an emulated device."""
    return int(array.ctypes.data if hasattr(array, "ctypes") else array.data.ptr)


def check_aligned(name: str, array: Array) -> None:
    """ShapeError where an array does not begin at a multiple of 16 bytes, which kernels read at once."""
    if address_of(array) % 16:
        raise ShapeError(f"{name}: an array that begins at a multiple of 16 bytes expected")
