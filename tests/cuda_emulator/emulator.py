"""Runs kernel sources of kernels/cuda on a CPU: builds them with g++ against emu_cuda.h and calls them on NumPy arrays.

It sees missing barriers, divergent collectives, cp.async used before it is waited for, accesses outside of arrays and of
shared memory, wrong fragments. It cannot see bank conflicts, speed, or reordering by a weak memory model.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import mmap
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from emulated_copies import Copies
from launch_limits import check_limits
from numpy.typing import NDArray

from flm.kernels.cuda.jit import FOLDER, INCLUDE
from flm.kernels.cuda.kernel import Kernel
from flm.kernels.cuda.nvrtc import include_folder
from flm.kernels.staging import DeviceMemory

HERE = Path(__file__).resolve().parent
SHIM = "flm_ptx_emu.h"
FLAGS = ["-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-w"]
# Schedules: forward and reverse with cp.async done at wait and at issue, then seeds. See run_all in emu_launch.h.
SETTINGS = (0, 1, 2, 3, 4, 7, 10, 13)
TOGETHER = 8  # instances in one library
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_libc = ctypes.CDLL(None, use_errno=True)
_one_at_a_time = threading.Lock()  # the emulation's state is the process' own

Array = NDArray[Any]
Launch = tuple[Kernel, tuple[int, ...], int, Sequence[Any], int]


class EmulationError(RuntimeError):
    """What the kernel did wrong, and which thread did it."""


class DeviceArray(np.ndarray):
    """An array in the memory of an emulated device."""


def guarded(array: Array, align: int = 16) -> Array:
    """A copy that ends at a page nobody may touch: a read or write past its end faults.

    The end is rounded up to `align` bytes, because kernels may read whole vectors; 1 for arrays of odd length."""
    array = np.ascontiguousarray(array)
    size = -(-array.nbytes // align) * align
    pages = max(1, -(-size // mmap.PAGESIZE))
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    end = base + pages * mmap.PAGESIZE
    if _libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    whole = np.frombuffer(memory, np.uint8, pages * mmap.PAGESIZE)
    whole[:] = 0xFF  # what is read ahead of the array is NaN
    flat = whole[len(whole) - size :][: array.nbytes]
    out = flat.view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def cache_folder() -> Path:
    """Where built libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flm-cluster" / "emulated"


@lru_cache(maxsize=1)
def compiler() -> str:
    """g++, version 12 or newer. Raises RuntimeError saying what to install."""
    path = shutil.which("g++")
    if path is None:
        raise RuntimeError(
            "g++ 12 or newer is needed to test the CUDA kernels (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)"
        )
    major = subprocess.run([path, "-dumpversion"], check=True, capture_output=True, text=True).stdout
    if int(major.split(".")[0]) < 12:
        raise RuntimeError(f"g++ 12 or newer is needed to test the CUDA kernels, {path} is {major.strip()}")
    return path


def _entry_points(kernels: Sequence[Kernel]) -> str:
    """C++ that runs launches of these kernels by number."""
    cases = "".join(
        f"case {i}: l.body = emu::bind(&{k.name}, args[i], kinds[i]); break;\n" for i, k in enumerate(kernels)
    )
    return f"""
extern "C" const char* emu_run(int n, const int* which, const int* shape, const long* dyn, int setting,
                               const int* streams, void*** args, const char** kinds) {{
  static std::string error;
  try {{
    std::vector<emu::Launch> launches;
    for (int i = 0; i < n; ++i, shape += 6) {{
      emu::Launch l{{dim3(shape[0], shape[1], shape[2]), dim3(shape[3], shape[4], shape[5]), size_t(dyn[i]), {{}}}};
      switch (which[i]) {{ {cases} }}
      launches.push_back(std::move(l));
    }}
    emu::run_all(launches, setting, streams);
    return nullptr;
  }} catch (std::exception& e) {{
    error = e.what();
    return error.c_str();
  }}
}}
"""


def inlined(source: str) -> str:
    """The source with this project's headers in place of their includes, each once."""
    seen: set[str] = set()

    def text_of(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        return INCLUDE.sub(text_of, (FOLDER / name).read_text().replace("#pragma once", ""))

    return INCLUDE.sub(text_of, source)


def _compile(name: str, text: str, command: list[str]) -> Path:
    """What `command` makes of a C++ text, from the cache or made now. The command lacks only its output."""
    shim = [path.read_text() for path in sorted({*HERE.glob("*.h"), *HERE.glob("*.cpp")})]
    parts = [text, name, *command, platform.platform(), *shim]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    target = cache_folder() / key / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:  # two processes of tests need the same library
        if not target.exists():
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _run_compiler(text, command, target)
    return target


def _run_compiler(text: str, command: list[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache_folder()) as work:
        file, made = Path(work, "source.cpp"), Path(work, "made")
        file.write_text(text)
        done = subprocess.run(
            [*command, str(file), "-o", str(made)], check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"g++ refused a kernel source:\n{done.stderr[:4000]}")
        os.replace(made, target)


@lru_cache(maxsize=1)
def _shim() -> list[str]:
    """The command that builds a source against the shim, whose headers are precompiled and whose runtime is an object."""
    command = [compiler(), *FLAGS, f"-I{HERE}", "-isystem", include_folder()]
    header = _compile(f"{SHIM}.gch", f'#include "{HERE / SHIM}"\n', [*command, "-x", "c++-header"])
    runtime = _compile("runtime.o", (HERE / "emu_runtime.cpp").read_text(), [*command, "-c"])
    return [*command[:-3], f"-I{header.parent}", *command[-3:], "-shared", str(runtime)]


def build(source: str, kernels: Sequence[Kernel]) -> Any:
    """The shared library of a source's instances, from the cache or built now."""
    text = f'#include "{SHIM}"\n{source}{_entry_points(kernels)}'
    loaded = ctypes.CDLL(str(_compile("kernel.so", text, _shim())))
    loaded.emu_run.restype = ctypes.c_char_p
    return loaded


def _argument(value: Any) -> tuple[Any, str]:
    """A C value and its kind, as emu_launch.h names them."""
    if value is None:
        return ctypes.c_void_p(0), "p"
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data), "p"
    if isinstance(value, int):
        if not -(2**31) <= value < 2**31:
            raise OverflowError(f"{value} does not fit into a kernel's 32-bit integer")
        return ctypes.c_int(value), "i"
    if isinstance(value, float):
        return ctypes.c_float(value), "f"
    kinds = {"int64": "l", "uint64": "l", "int32": "i", "uint32": "i", "float32": "f"}
    return np.ctypeslib.as_ctypes_type(value.dtype)(value.item()), kinds[value.dtype.name]


class EmulatedDevice(Copies):
    """The Device of kernel.py for NumPy arrays. A few instances of one source are built together, all in parallel; those that
    are not listed, when they are launched.

    setting: the schedule of the launches to come. edits: (old, new) made in every source that has `old`, to plant a fault.
    """

    def __init__(self, kernels: Sequence[Kernel], edits: Sequence[tuple[str, str]] = ()) -> None:
        self.setting = 0
        self.processors = 4
        self._where: dict[Kernel, tuple[Any, int]] = {}
        sources = sorted({kernel.source for kernel in kernels})
        texts = {name: inlined((FOLDER / name).read_text()) for name in sources}
        for old, new in edits:
            assert sum(old in text for text in texts.values()) == 1, f"a source with {old!r} expected"
            texts = {name: text.replace(old, new, 1) for name, text in texts.items()}
        self._build(kernels, texts)

    def _build(self, kernels: Sequence[Kernel], texts: Mapping[str, str]) -> None:
        """Build instances of the sources' `texts`."""
        sources: dict[str, list[Kernel]] = {}
        for kernel in dict.fromkeys(kernels):
            sources.setdefault(kernel.source, []).append(kernel)
        parts = [
            (name, found[i : i + TOGETHER])
            for name, found in sorted(sources.items())
            for i in range(0, len(found), TOGETHER)
        ]
        _shim()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            libraries = pool.map(lambda part: build(texts[part[0]], part[1]), parts)
            for (_, members), library in zip(parts, libraries, strict=True):
                self._where |= {kernel: (library, i) for i, kernel in enumerate(members)}

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Filled with poison, ends at a guard page."""
        dtype = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        return guarded(np.full(size, 0xFF, np.uint8)).view(dtype).reshape(shape).view(DeviceArray)

    def asarray(self, host: Array) -> Array:
        return guarded(host).view(DeviceArray)

    def memory(self) -> DeviceMemory:
        return DeviceMemory("emulated", 1 << 30, 1 << 30)

    def prepare(
        self, kernels: Iterable[Kernel], progress: Callable[[int, int, Kernel], None] | None = None
    ) -> None:
        """Build those that are not yet."""
        todo = [kernel for kernel in dict.fromkeys(kernels) if kernel not in self._where]
        texts = {name: inlined((FOLDER / name).read_text()) for name in {kernel.source for kernel in todo}}
        self._build(todo, texts)
        for done, kernel in enumerate(todo, 1):
            if progress is not None:
                progress(done, len(todo), kernel)

    def record(self, calls: list[Callable[[], None]]) -> Callable[[], None]:
        """Runs the calls at every launch: what they do not launch as kernels is not seen."""
        return lambda: [call() for call in calls] and None

    def enqueue(self, call: Callable[[int], None]) -> None:
        """What a library does, done at once."""
        call(0)

    def launch(
        self, kernel: Kernel, grid: tuple[int, ...], block: int, args: Sequence[Any], shared: int = 0
    ) -> None:
        self.launch_streams([(kernel, grid, block, args, shared)], None)

    def launch_streams(self, launches: Sequence[Launch], streams: Sequence[int] | None) -> None:
        """Launches of one source. streams: one number each; streams run side by side, each in its own order."""
        for kernel in {launch[0] for launch in launches} - set(self._where):
            source = inlined((FOLDER / kernel.source).read_text())
            self._where[kernel] = build(source, [kernel]), 0
        library = self._where[launches[0][0]][0]
        keep, rows, kinds, shapes = [], [], [], []
        for kernel, grid, block, args, shared in launches:
            check_limits(kernel, grid, block, shared)
            values = [_argument(a) for a in args]
            keep.append(values)
            rows.append((ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v, _ in values)))
            kinds.append("".join(kind for _, kind in values).encode())
            shapes += [*(*grid, 1, 1)[:3], block, 1, 1]
        n = len(launches)
        with _one_at_a_time:
            error = library.emu_run(
                n,
                (ctypes.c_int * n)(*(self._where[launch[0]][1] for launch in launches)),
                (ctypes.c_int * len(shapes))(*shapes),
                (ctypes.c_long * n)(*(launch[4] for launch in launches)),
                self.setting,
                None if streams is None else (ctypes.c_int * n)(*streams),
                (ctypes.c_void_p * n)(*(ctypes.addressof(row) for row in rows)),
                (ctypes.c_char_p * n)(*kinds),
            )
        if error:
            raise EmulationError(error.decode())
