"""What kernel tests share: how far a result may be off, and proof that a test sees a planted fault."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulator import SETTINGS, EmulatedDevice, EmulationError, guarded
from numpy.typing import NDArray

from flm.kernels.cuda.kernel import Kernel

Array = NDArray[Any]
ACTIVATIONS = ("float16", "bfloat16")


def on_gpu() -> bool:
    """Whether the tests run on a GPU (see on_gpu.py)."""
    return os.environ.get("FLM_TEST_GPU", "") == "1"


def open_device(kernels: Sequence[Kernel]) -> Any:
    """What the tests of these kernels run on."""
    if not on_gpu():
        return EmulatedDevice(kernels)
    from on_gpu import GpuTestDevice

    return GpuTestDevice(kernels)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of float32, float16 or bfloat16."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def rounding(dtype: str) -> float:
    """The largest relative error of one rounding to nearest."""
    return float(ml_dtypes.finfo(numpy_dtype(dtype)).eps) / 2


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> Array:
    """Random values that end at a guard page."""
    return guarded((rng.standard_normal(shape) * scale).astype(numpy_dtype(dtype)), 1)


def assert_close(got: Array, want: Array, relative: float, absolute: float = 0.0) -> None:
    """|got - want| <= relative * |want| + absolute, everywhere. want in float64; NaN is never close."""
    got = got.astype(np.float64)
    bad = ~(np.abs(got - want) <= relative * np.abs(want) + absolute)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(f"{bad.sum()} of {bad.size} differ, first at {at}: {got[at]} for {want[at]}")


def sweep(device: EmulatedDevice, check: Callable[[EmulatedDevice], None]) -> None:
    """The check under every schedule."""
    for device.setting in SETTINGS:
        check(device)


def assert_caught(
    kernels: Sequence[Kernel], edit: tuple[str, str], check: Callable[[EmulatedDevice], None]
) -> None:
    """With this edit of the source, the check must fail under at least one schedule."""
    if on_gpu():
        pytest.skip("faults are planted in the emulator, whose schedules show them")
    device = EmulatedDevice(kernels, [edit])
    for device.setting in SETTINGS:
        try:
            check(device)
        except (EmulationError, AssertionError):
            return
    raise AssertionError(f"no schedule shows the fault: {edit[0]!r} -> {edit[1]!r}")
