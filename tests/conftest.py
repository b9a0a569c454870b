"""Where several processes share the tests (`pytest -n`): kernels compiled once, one BLAS thread each, long files first."""

from __future__ import annotations

import os

import pytest

from flm.cluster.launch import compile_kernels, needs_compiling

# Files that take long alone; the others fill the gaps behind them.
LONG = (
    "test_cuda_engine",
    "test_launch",
    "test_engine",
    "test_linear",
    "test_attention",
    "test_experts",
    "test_sampling",
)
LONG += ("test_golden", "test_checks", "test_rank", "test_latent", "test_gpu_check", "test_jit")


def pytest_configure(config: pytest.Config) -> None:
    """Runs in the process that hands out the tests before it starts those that run them, which inherit its environment."""
    if getattr(config.option, "numprocesses", None):
        os.environ |= {"OPENBLAS_NUM_THREADS": "1"}
        if needs_compiling():
            compile_kernels()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--no-loadscope-reorder` files are handed out in this order."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.path.stem not in LONG)
