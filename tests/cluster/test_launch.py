"""Compiling the kernels ahead of a start: what goes wrong is said, and no compiler outlives who asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flm.cluster import launch
from flm.worker.errors import FlmError


def test_kernels_that_cannot_be_compiled_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "usable_cpus", lambda: 0)
    with pytest.raises(FlmError, match=r"^the CPU kernels cannot be compiled: between 1 and .* got 0$"):
        launch.compile_kernels()


INTERRUPTED = """
from flm.cluster import launch
from flm.cluster.cli.interrupts import Interrupts
launch._COMPILE = launch._COMPILE.replace("from flm.kernels.cpu.backend import warm", "import time")
launch._COMPILE = launch._COMPILE.replace("warm(int(sys.argv[1]))", "time.sleep(60)")
with Interrupts():
    launch.compile_kernels()
"""


@pytest.mark.parametrize(
    ("number", "after"),
    [(signal.SIGINT, 0.3), (signal.SIGTERM, 0.3), (signal.SIGHUP, 0.3), (signal.SIGTERM, 0.0)],
)
def test_an_interrupt_ends_the_compiler(number: signal.Signals, after: float, tmp_path: Path) -> None:
    """`after` its start, or while it starts."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], env=dict(os.environ), stderr=subprocess.DEVNULL, cwd=tmp_path
    )
    try:
        deadline = time.monotonic() + 20
        while not (children := psutil.Process(process.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(after)
        process.send_signal(number)
        assert process.wait(10) != 0
        assert not psutil.wait_procs(children, timeout=10)[1]
    finally:
        process.kill()
        process.wait()
