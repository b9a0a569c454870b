"""Bring numba up with OpenMP and a cache that a change of the kernels empties; load or compile the kernels."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.compiled import cache_root, hold, prune_folders
from flm.kernels.errors import KernelError, OpenMPMissing

_LOCK = threading.Lock()


@dataclass(frozen=True)
class Kernels:
    """run: a program [rows + 1, ROW_WIDTH], the last row for its own use, to its status. ops, leaves: addresses of the
    compiled functions by name. held: what keeps their folder from being removed."""

    run: Callable[[NDArray[np.int64]], int]
    ops: dict[str, int]
    leaves: dict[str, int]
    held: IO[str]


def cache_directory() -> Path:
    """Where compiled kernels are kept: one folder per installed version of the kernel sources, under the user's cache."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        # numba takes what was compiled of another copy, or before a file was written anew, for stale
        digest.update(f"{source} {source.stat().st_mtime_ns} ".encode() + source.read_bytes())
    return cache_root() / f"kernels-{digest.hexdigest()[:16]}"


def is_cached() -> bool:
    """Whether this version was compiled into the cache before; loading then takes a moment, else about half a minute."""
    return any(cache_directory().glob("**/*run_program*.nbc"))


def load_kernels(threads: int) -> Kernels:
    """The kernels, for `threads` threads. Raises OpenMPMissing, or KernelError if numba already runs with fewer."""
    import numba

    with _LOCK:
        limit = numba.config.NUMBA_NUM_THREADS
        if threads < 1 or threads > limit:
            if threads < 1 or _launched():
                raise KernelError(
                    f"between 1 and {limit} threads expected (numba is already running), got {threads}"
                )
            numba.config.NUMBA_NUM_THREADS = threads
        _require_openmp(numba)
        folder, new, installation = cache_directory(), not is_cached(), str(Path(__file__).parent)
        held = hold(folder, installation)
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
        try:
            from flm.kernels.cpu import attention, collective, elementwise, leaves, linear, program, sampling
        finally:
            numba.config.CACHE_DIR = before
        if new:
            prune_folders(folder.parent, folder, installation, time.time())
    ops = [
        linear.linear,
        linear.prepare,
        linear.embedding,
        elementwise.norm,
        elementwise.silu_mul,
        elementwise.rope_kv_write,
    ]
    ops += [elementwise.take_rows, attention.paged_attention, sampling.sample, collective.all_reduce]
    ops += [collective.all_gather_cols, collective.broadcast, collective.barrier]
    run_program: Any = program.run_program

    def run(rows: NDArray[np.int64]) -> int:
        numba.set_num_threads(threads)  # per calling thread
        count = len(rows) - 1
        return int(run_program(rows.ctypes.data, count, rows[count:].ctypes.data, threads))

    return Kernels(
        run,
        {op.__name__: op.address for op in ops},
        {leaf.__name__: leaf.address for leaf in leaves.LEAVES},
        held,
    )


def load_ops(*modules: str) -> dict[str, int]:
    """Addresses of the ops in modules of this folder that only some models need, after load_kernels."""
    import numba

    with _LOCK:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(cache_directory())
        try:
            loaded = [import_module(f"flm.kernels.cpu.{name}") for name in modules]
        finally:
            numba.config.CACHE_DIR = before
    return {op.__name__: op.address for module in loaded for op in module.OPS}


def _launched() -> bool:
    from numba.np.ufunc import parallel

    return bool(parallel._is_initialized)


def _require_openmp(numba: Any) -> None:
    from numba.np.ufunc import parallel

    if not _launched():
        numba.config.THREADING_LAYER = "omp"
        # Between steps a thread spins about 10 µs, then sleeps (inside a step program.py rules). libgomp's default of
        # milliseconds takes the core from other processes. Read once, when libgomp is loaded.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        try:
            parallel._launch_threads()
        except ValueError as error:
            raise OpenMPMissing("which cannot be loaded") from error
    if numba.threading_layer() != "omp":
        raise OpenMPMissing(f"but this process already uses {numba.threading_layer()!r}")
