"""Backends and random weights for the kernel tests."""

from __future__ import annotations

import numpy as np
import pytest

from flm.kernels.cpu.backend import CpuBackend
from flm.kernels.reference import ReferenceBackend


@pytest.fixture(scope="session")
def cpu() -> CpuBackend:
    return CpuBackend(threads=2)


@pytest.fixture(scope="session")
def cpu1() -> CpuBackend:
    return CpuBackend(threads=1)


@pytest.fixture(scope="session")
def exact() -> ReferenceBackend:
    return ReferenceBackend(np.float64)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)
