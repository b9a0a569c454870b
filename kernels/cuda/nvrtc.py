"""NVRTC through ctypes: CUDA C++ to a cubin. Needs neither a GPU nor a driver.

CuPy's own binding is not used, because it drops the last byte of a cubin and asks the device for its architecture.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from flm.kernels.errors import CompileError, ToolkitMissing

PACKAGES = "nvidia-cuda-nvrtc==13.0.* and nvidia-cuda-runtime==13.0.*"


@dataclass(frozen=True)
class Built:
    """A cubin, the symbol that the name expression was mangled to, and the log of compiler and assembler."""

    cubin: bytes
    symbol: str
    log: str


# Folders below site-packages of the headers and of NVRTC: CUDA 13's wheels, then CUDA 12's.
WHEELS = (
    ("nvidia/cu13/include", "nvidia/cu13/lib"),
    ("nvidia/cuda_runtime/include", "nvidia/cuda_nvrtc/lib"),
)


def _wheels() -> tuple[tuple[str, str], ...]:
    """WHEELS, first those for the CUDA that CuPy was built for: both may be there, with PyTorch for one, and a driver of
    CUDA 12 does not load what CUDA 13 makes."""
    try:
        metadata.version("cupy-cuda12x")
    except metadata.PackageNotFoundError:
        return WHEELS
    return WHEELS[::-1]


@lru_cache(maxsize=1)
def _toolkit() -> tuple[str, str]:
    """The folder of cuda_fp16.h and the path of NVRTC: of the wheels, so that both are of one version; else as installed
    on the system. Raises ToolkitMissing."""
    for include, lib in _wheels():
        for entry in sys.path:
            found = sorted(Path(entry, lib).glob("libnvrtc.so.*"))
            if found and Path(entry, include, "cuda_fp16.h").exists():
                return str(Path(entry, include)), str(found[-1])
    try:
        from cuda import pathfinder
    except ImportError as e:
        raise ToolkitMissing("NVRTC was not found", PACKAGES) from e
    headers = pathfinder.find_nvidia_header_directory("cudart")
    if headers is None:
        raise ToolkitMissing("the CUDA headers (cuda_fp16.h) were not found", PACKAGES)
    try:
        return str(headers), str(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path)
    except (pathfinder.DynamicLibNotFoundError, OSError) as e:
        raise ToolkitMissing("the NVRTC library was not found", PACKAGES) from e


def include_folder() -> str:
    """The folder of cuda_fp16.h. Raises ToolkitMissing."""
    return _toolkit()[0]


@lru_cache(maxsize=1)
def _library() -> Any:
    path = Path(_toolkit()[1])
    for builtins in path.parent.glob(
        "libnvrtc-builtins.so.*"
    ):  # NVRTC opens it by name, from no known folder
        ctypes.CDLL(str(builtins))
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = c_char_p
    strings = POINTER(c_char_p)
    library.nvrtcCreateProgram.argtypes = [POINTER(c_void_p), c_char_p, c_char_p, c_int, strings, strings]
    library.nvrtcCompileProgram.argtypes = [c_void_p, c_int, strings]
    return library


def version() -> tuple[int, int]:
    """Major and minor version of NVRTC."""
    major, minor = c_int(), c_int()
    _check(_library().nvrtcVersion(byref(major), byref(minor)))
    return major.value, minor.value


def _check(status: int) -> None:
    if status:
        raise CompileError("NVRTC", _library().nvrtcGetErrorString(status).decode())


def _strings(values: list[str]) -> Any:
    return (c_char_p * len(values))(*(v.encode() for v in values))


def _read(program: c_void_p, what: str) -> bytes:
    """The log or the cubin of a program."""
    size = c_size_t()
    _check(getattr(_library(), f"nvrtcGet{what}Size")(program, byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{what}")(program, text))
    return text.raw


def build(source: str, file: str, headers: dict[str, str], name: str, options: list[str]) -> Built:
    """Compile one kernel. headers: texts by the name they are included by; name: a name expression.

    Raises CompileError with the compiler's log, ToolkitMissing where NVRTC is not installed.
    """
    library, program = _library(), c_void_p()
    texts, names = _strings(list(headers.values())), _strings(list(headers))
    _check(
        library.nvrtcCreateProgram(byref(program), source.encode(), file.encode(), len(headers), texts, names)
    )
    try:
        _check(library.nvrtcAddNameExpression(program, name.encode()))
        status = library.nvrtcCompileProgram(program, len(options), _strings(options))
        log = _read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status:
            raise CompileError(f"{file}: {name}", log)
        symbol = c_char_p()
        _check(library.nvrtcGetLoweredName(program, name.encode(), byref(symbol)))
        return Built(_read(program, "CUBIN"), (symbol.value or b"").decode(), log)
    finally:
        library.nvrtcDestroyProgram(byref(program))
