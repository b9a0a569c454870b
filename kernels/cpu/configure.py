"""Bring numba up with OpenMP and a cache that a change of the kernels empties; load or compile the program function."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flm.kernels.errors import KernelError, OpenMPMissing

_LOCK = threading.Lock()


def cache_directory() -> Path:
    """Where compiled kernels are kept: one folder per version of the kernel sources, under the user's cache."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "flm-cluster" / f"kernels-{digest.hexdigest()[:16]}"


def is_cached() -> bool:
    """Whether some machine compiled this version into the cache before (then loading takes a moment, not a minute)."""
    return any(cache_directory().glob("**/*.nbc"))


def load_program(threads: int) -> Callable[[Any, int], int]:
    """run_program, ready for `threads` threads. Raises OpenMPMissing, or KernelError if numba already runs with fewer."""
    import numba

    with _LOCK:
        limit = numba.config.NUMBA_NUM_THREADS
        if threads < 1 or threads > limit:
            if threads < 1 or _launched():
                raise KernelError(f"between 1 and {limit} threads expected (numba is already running), got {threads}")
            numba.config.NUMBA_NUM_THREADS = threads
        _require_openmp(numba)
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(cache_directory())
        try:
            from flm.kernels.cpu.program import run_program
        finally:
            numba.config.CACHE_DIR = before
    run: Callable[[Any, int], int] = run_program
    return run


def _launched() -> bool:
    from numba.np.ufunc import parallel

    return bool(parallel._is_initialized)


def _require_openmp(numba: Any) -> None:
    from numba.np.ufunc import parallel

    if not _launched():
        numba.config.THREADING_LAYER = "omp"
        try:
            parallel._launch_threads()
        except ValueError as error:
            raise OpenMPMissing("which cannot be loaded") from error
    if numba.threading_layer() != "omp":
        raise OpenMPMissing(f"but this process already uses {numba.threading_layer()!r}")
