"""Kernels compiled at first use and kept on disk: a warm start compiles nothing.

The cache's key covers the source, every header of this folder that it includes, CUDA's own headers, the compiler's
version, the architecture and the options, so that no edit can leave an old cubin in use.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from flm.kernels.compiled import cache_root, prune_cubins, used
from flm.kernels.cuda import nvrtc
from flm.kernels.cuda.kernel import Kernel
from flm.kernels.errors import CompileError, UnsupportedDevice

FOLDER = Path(__file__).resolve().parent
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
OLDEST_ARCH = 80
Progress = Callable[[int, int, Kernel], None]


@dataclass(frozen=True)
class Compiled:
    """One kernel's cubin on disk and what the assembler said of it. local: bytes a thread keeps in memory, spills
    included; shared: static bytes a block."""

    path: Path
    symbol: str
    registers: int
    local: int
    spills: int
    shared: int


def cache_folder() -> Path:
    """Where cubins are kept."""
    return cache_root() / "cubin"


def headers_of(source: str, folder: Path = FOLDER) -> dict[str, str]:
    """The texts of all headers of `folder` that a source includes, directly or through another."""
    found: dict[str, str] = {}
    todo = INCLUDE.findall(source)
    while todo:
        name = todo.pop()
        if name not in found and (folder / name).exists():
            found[name] = (folder / name).read_text()
            todo += INCLUDE.findall(found[name])
    return dict(sorted(found.items()))


@lru_cache(maxsize=1)
def _toolkit() -> str:
    """A fingerprint of the compiler and of CUDA's headers."""
    texts = [Path(nvrtc.include_folder(), name).read_bytes() for name in ("cuda_fp16.hpp", "cuda_bf16.hpp")]
    return f"{nvrtc.version()} {hashlib.sha256(b''.join(texts)).hexdigest()}"


def compile_options(arch: int) -> list[str]:
    """NVRTC's options for compute capability arch / 10."""
    return [f"-arch=sm_{arch}", "--std=c++17", "-default-device", "--ptxas-options=-v"]


def resources(log: str, symbol: str) -> dict[str, int]:
    """Registers, local memory, spills and static shared memory of a kernel, from the assembler's log."""
    entry = re.search(rf"entry function '{re.escape(symbol)}'.*?Used (\d+) registers([^\n]*)", log, re.DOTALL)
    assert entry is not None, f"no entry for {symbol} in the log:\n{log}"
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry[0])
    shared = re.search(r"(\d+) bytes smem", entry[2])
    return {
        "registers": int(entry[1]),
        "local": int(frame[1]) if frame else 0,
        "spills": int(frame[2]) + int(frame[3]) if frame else 0,
        "shared": int(shared[1]) if shared else 0,
    }


def compile_kernel(kernel: Kernel, arch: int, cache: Path | None = None, folder: Path = FOLDER) -> Compiled:
    """The kernel for compute capability arch / 10, from the cache or compiled now.

    Raises UnsupportedDevice below sm_80, CompileError, ToolkitMissing.
    """
    if arch < OLDEST_ARCH:
        raise UnsupportedDevice(
            f"a GPU of compute capability 8.0 or newer expected, got {arch / 10:.1f}; run the model on the CPU"
        )
    source = (folder / kernel.source).read_text()
    headers, options = headers_of(source, folder), compile_options(arch)
    parts = [kernel.name, source, json.dumps(headers), json.dumps(options), _toolkit()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    cache = cache_folder() if cache is None else cache
    cubin, facts = cache / f"{key}.cubin", cache / f"{key}.json"
    if not cubin.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache / f".lock-{key[:2]}"):  # ranks of a host start together, and want the same
            if not cubin.exists():
                options.append(f"-I{nvrtc.include_folder()}")
                built = nvrtc.build(source, kernel.source, headers, kernel.name, options)
                known = {
                    "symbol": built.symbol,
                    **resources(built.log, built.symbol),
                    "kernel": asdict(kernel),
                }
                _store(
                    facts, json.dumps(known).encode()
                )  # before the cubin, whose presence says: both are whole
                _store(cubin, built.cubin)
                prune_cubins(cache, time.time())
    used(cubin)
    known = json.loads(facts.read_text())
    known.pop("kernel")
    return Compiled(cubin, **known)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process or thread that asks for the same file is inside meanwhile."""
    import fcntl  # where there are NVIDIA GPUs and no fcntl, NVRTC is not found either

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _store(path: Path, content: bytes) -> None:
    """All of a file or none, whoever else writes the same."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


def compile_all(
    kernels: Iterable[Kernel], arch: int, progress: Progress | None = None, cache: Path | None = None
) -> dict[Kernel, Compiled]:
    """Many kernels at once, in as many threads as there are cores. progress(done, all, kernel) after each.

    Where NVRTC refuses one, the others are compiled all the same, and are in the cache when CompileError is raised."""
    todo = list(dict.fromkeys(kernels))
    done: dict[Kernel, Compiled] = {}
    refused: list[CompileError] = []
    with ThreadPoolExecutor(max_workers=max(1, len(os.sched_getaffinity(0)))) as pool:
        futures = {pool.submit(compile_kernel, kernel, arch, cache): kernel for kernel in todo}
        try:
            for future in as_completed(futures):
                try:
                    done[futures[future]] = future.result()
                except CompileError as error:
                    refused.append(error)
                    continue
                if progress is not None:
                    progress(len(done), len(todo), futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if refused:
        raise refused[0]
    return done
