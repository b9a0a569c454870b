"""Before several processes share the tests (`pytest -n`): the kernels compiled once, one BLAS thread for each of them."""

from __future__ import annotations

import os

import pytest

from flm.cluster.launch import compile_kernels, needs_compiling


def pytest_configure(config: pytest.Config) -> None:
    """Runs in the process that hands out the tests before it starts those that run them, which inherit its environment."""
    if getattr(config.option, "numprocesses", None):
        os.environ |= {"OPENBLAS_NUM_THREADS": "1"}
        if needs_compiling():
            compile_kernels()
