"""Which GPUs this process may use: those that CUDA_VISIBLE_DEVICES leaves, and only such as the kernels run on."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from flm.kernels.cuda.jit import OLDEST_ARCH


@dataclass(frozen=True)
class VisibleGpu:
    """memory in bytes; bandwidth of that memory in bytes/s, 0 where the driver does not say."""

    name: str
    memory: int
    bandwidth: float


def installed() -> bool:
    """Whether CuPy is there to use GPUs with."""
    return importlib.util.find_spec("cupy") is not None


def visible_gpus() -> list[VisibleGpu]:
    """Empty where there is no CuPy, no driver for it, or no GPU new enough. Takes no memory of any of them."""
    if not installed():
        return []
    from cupy.cuda import runtime

    return gpus_of(runtime)


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
        if 10 * f["major"] + f["minor"] >= OLDEST_ARCH
    ]


def _bandwidth(facts: Any) -> float:
    """Two transfers a clock (kHz) over the bus (bits)."""
    return 2.0 * facts.get("memoryClockRate", 0) * 1000 * facts.get("memoryBusWidth", 0) / 8
