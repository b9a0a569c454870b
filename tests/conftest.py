"""Where several processes share the tests (`pytest -n`): kernels compiled once, one BLAS thread each, long files first."""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import tempfile
import threading
from collections.abc import Callable

import pytest

# Files that take long; the others fill the gaps behind them.
LONG = ("test_cuda_engine", "test_engine", "test_linear", "test_golden", "test_latent", "test_experts")
LONG += ("test_checks", "test_rank", "test_cli_gateway", "test_launch")
COMPILING = "FLM_TEST_COMPILING"  # names a file that is locked while the CPU kernels are being compiled


def pytest_configure(config: pytest.Config) -> None:
    """Runs in the process that hands out the tests before it starts those that run them, which inherit its environment."""
    _heed_interrupts()
    if getattr(config.option, "numprocesses", None) and "FLM_TEST_GPU" not in os.environ:
        # imported here, for a machine with a GPU may lack what the cluster needs
        from flm.cluster.launch.launch import compile_kernels, needs_compiling

        os.environ |= {"OPENBLAS_NUM_THREADS": "1"}
        if needs_compiling():
            _compile_beside(compile_kernels)


def _heed_interrupts() -> None:
    """Commands inherit what nohup or a script's `&` ignores, and tests interrupt them."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def _compile_beside(compile_kernels: Callable[[], object]) -> None:
    lock = tempfile.NamedTemporaryFile(prefix="flm-compiling-")  # noqa: SIM115 (open until compiled)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.environ[COMPILING] = lock.name

    def compile_and_release() -> None:
        with lock:
            compile_kernels()

    threading.Thread(target=compile_and_release).start()


@functools.cache
def wait_until_compiled() -> None:
    try:
        with open(os.environ[COMPILING], encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
    except (KeyError, FileNotFoundError):
        return  # nothing was to be compiled, or it is done


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "cuda" not in item.path.parts:
        wait_until_compiled()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--no-loadscope-reorder` files are handed out in this order: first those that need no compiled CPU kernels."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: ("cuda" not in item.path.parts, item.path.stem not in LONG))
