"""Whether numba's OpenMP layer can be loaded here, asked without importing numba, which takes half a second."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path

from flm.kernels.errors import OpenMPMissing


def require_openmp() -> None:
    """OpenMPMissing where a rank on this machine's CPUs could not start. Takes milliseconds, and starts no threads."""
    os.environ.setdefault(
        "GOMP_SPINCOUNT", "1000"
    )  # as cpu/configure.py: the runtime reads it when it is loaded
    spec = importlib.util.find_spec("numba")
    folders = spec.submodule_search_locations or [] if spec is not None else []
    layers = [layer for folder in folders for layer in Path(folder).glob("np/ufunc/omppool*")]
    if not layers:
        raise OpenMPMissing("which this numba was built without")
    try:
        ctypes.CDLL(str(layers[0]))  # brings the runtime along, as importing it does
    except OSError as error:
        raise OpenMPMissing(f"which cannot be loaded ({error})") from None
