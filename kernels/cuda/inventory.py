"""Which GPUs this process may use: those that CUDA_VISIBLE_DEVICES leaves, and only such as the kernels run on."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from flm.kernels.cuda.cublas_lt import require_library
from flm.kernels.cuda.jit import OLDEST_ARCH
from flm.kernels.errors import ToolkitMissing, UnsupportedDevice

CUPY_MISSING = "cupy is not installed: pip install 'flm-cluster[cuda13]' for drivers from 580, 'flm-cluster[cuda12]' for older"


@dataclass(frozen=True)
class VisibleGpu:
    """memory in bytes; bandwidth of that memory in bytes/s, 0 where the driver does not say."""

    name: str
    memory: int
    bandwidth: float


def installed() -> bool:
    """Whether CuPy is there to use GPUs with."""
    return importlib.util.find_spec("cupy") is not None


def missing_cublas() -> str:
    """What `matmul: cublas` lacks here, and what brings it; empty where nothing, or where CuPy is not there either."""
    if not installed():
        return ""
    from cupy.cuda import runtime

    try:
        require_library(int(runtime.runtimeGetVersion()) // 1000)
    except ToolkitMissing as error:
        return str(error)
    return ""


def visible_gpus() -> list[VisibleGpu]:
    """Empty where there is no CuPy, no driver for it, or no GPU new enough. Takes no memory of any of them."""
    if not installed():
        return []
    from cupy.cuda import runtime

    return gpus_of(runtime)


def why_none() -> str:
    """Why visible_gpus() is empty, and what to do about it."""
    if not installed():
        return CUPY_MISSING
    from cupy.cuda import runtime

    return why_none_of(runtime)


def why_none_of(runtime: Any) -> str:
    try:
        require_usable(runtime)
    except UnsupportedDevice as error:
        return str(error)
    return ""


def require_usable(runtime: Any, ordinal: int = 0) -> Any:
    """CuPy's properties of a GPU that the kernels run on. Raises UnsupportedDevice saying what is missing, and what to do."""
    driver, built = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if not driver:
        raise UnsupportedDevice("no NVIDIA driver is loaded; see nvidia-smi, install one, or run on the CPU")
    if driver // 1000 < built // 1000:
        raise UnsupportedDevice(
            f"a driver for CUDA {built // 1000} expected, this one knows CUDA {driver // 1000}.{driver % 1000 // 10}; "
            f"update it, or install 'flm-cluster[cuda{driver // 1000}]' in place of cuda{built // 1000}"
        )
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as e:
        raise UnsupportedDevice(f"no usable NVIDIA driver: {e}; see nvidia-smi, or run on the CPU") from e
    if ordinal >= count:
        raise UnsupportedDevice(
            f"GPU {ordinal} asked for, {count} visible; see nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    facts = runtime.getDeviceProperties(ordinal)
    if compute_capability(facts) < OLDEST_ARCH:
        raise UnsupportedDevice(
            f"compute capability 8.0 or newer expected, {facts['name'].decode()} has {compute_capability(facts) / 10}; "
            "use a newer GPU, or run on the CPU"
        )
    return facts


def compute_capability(facts: Any) -> int:
    """Ten times it, as in sm_80."""
    return 10 * int(facts["major"]) + int(facts["minor"])


def gpus_of(runtime: Any) -> list[VisibleGpu]:
    """Those of CuPy's runtime API."""
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError:  # no driver, no device, or a driver older than the runtime
        return []
    facts = [runtime.getDeviceProperties(i) for i in range(count)]
    return [
        VisibleGpu(f["name"].decode(), int(f["totalGlobalMem"]), _bandwidth(f))
        for f in facts
        if compute_capability(f) >= OLDEST_ARCH
    ]


def _bandwidth(facts: Any) -> float:
    """Two transfers a clock (kHz) over the bus (bits)."""
    return 2.0 * facts.get("memoryClockRate", 0) * 1000 * facts.get("memoryBusWidth", 0) / 8
