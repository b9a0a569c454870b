"""Compiling the kernels ahead of a start: what goes wrong is said, and no compiler outlives who asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from flm.cluster.cli.interrupts import Interrupts
from flm.cluster.launch import launch
from flm.cluster.planning.demand import Demand
from flm.cluster.planning.plan import plan_demands
from flm.cluster.settings.hardware import KNOWN_GPUS, Hardware, Machine
from flm.worker.errors import FlmError


def test_kernels_that_cannot_be_compiled_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "usable_cpus", lambda: 0)
    with pytest.raises(FlmError, match=r"^the CPU kernels cannot be compiled: between 1 and .* got 0$"):
        launch.compile_kernels()


def test_a_model_without_replicas_can_be_scaled_up_later() -> None:
    """Its ranks need as much as those of a model that runs, on the device that was asked for."""
    path = str(Path(__file__).resolve().parents[3] / "deploy" / "shapes" / "qwen-72b")
    hardware = Hardware((Machine("host", 32, 512 << 30, 0.0, 4, KNOWN_GPUS["h100"]),))
    none, one = (
        plan_demands([Demand("m", path, "auto", 4, replicas=count)], hardware).facts()["m"]
        for count in (0, 1)
    )
    assert none == one
    assert (one.device, one.rank_memory > 30 << 30) == ("cuda", True)


def test_waiting_for_an_interrupt_ends_when_another_thread_says_so() -> None:
    with Interrupts() as interrupts:
        interrupts.raising = False
        assert not interrupts.wait(0.0)
        threading.Timer(0.05, interrupts.wake).start()
        assert interrupts.wait(60.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.wait(60.0)
        assert (interrupts.count, interrupts.wait(0.0)) == (1, False)


INTERRUPTED = """
from flm.cluster.launch import launch
from flm.cluster.cli.interrupts import Interrupts
launch._COMPILE = launch._COMPILE.replace("from flm.kernels.cpu.backend import warm", "import time")
launch._COMPILE = launch._COMPILE.replace("warm(int(sys.argv[1]))", "time.sleep(300)")
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
        deadline = time.monotonic() + 60
        while not (children := psutil.Process(process.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(after)
        process.send_signal(number)
        assert process.wait(60) != 0
        assert not psutil.wait_procs(children, timeout=60)[1]
    finally:
        process.kill()
        process.wait()
