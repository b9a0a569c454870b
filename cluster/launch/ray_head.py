"""Our own Ray head: started in a process session of its own, so that exactly its processes can be ended.

Nothing here imports Ray: the head is started by a child process.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from flm.kernels.cores import usable_cpus
from flm.worker.errors import Unavailable

log = logging.getLogger(__name__)

START_SECONDS = 60.0
STOP_SECONDS = 1.0  # before SIGKILL
# Importing Ray takes as long as checking a plan does: both happen at once, and Ray starts only when told to.
_START = """
import sys
from flm.cluster.actors import start_head
if sys.stdin.readline() == "go\\n":
    start_head(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
"""

# Ray's agents and its workers read these. Metrics would go to a dashboard that is not there.
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's way to say: listen on 127.0.0.1 only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_open_telemetry": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_worker_niceness": "0",  # 15 by default: ranks and the gateway would yield to everything else
}


@dataclass(frozen=True)
class RayHead:
    """A head that runs, or is starting."""

    address: str
    folder: str
    session: int  # of its processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class StartingHead:
    """A head that will run on this machine. Nothing starts before `go`; `stop` it at any time."""

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(
            prefix="flm-ray-"
        )  # short: Ray's socket names below it must fit into 107 bytes
        port = free_port()
        self._log = Path(folder) / "start.log"
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(port), folder, str(usable_cpus())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=os.environ | ENVIRONMENT,
                cwd=folder,
                start_new_session=True,
            )
        self.head = RayHead(f"127.0.0.1:{port}", folder, self._process.pid)

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.close()

    def wait(self) -> RayHead:
        """Unavailable where Ray does not start; nothing is left of it then."""
        try:
            code = self._process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            code = -1
        if code:
            said = self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            self.stop()
            raise Unavailable(f"Ray did not start: {said[-1]}")
        return self.head

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        end_head(self.head)


def end_head(head: RayHead) -> None:
    """End all processes of a head, and only those; remove its files."""
    gone_by = time.monotonic() + STOP_SECONDS
    for process in _processes(head):
        _signal(process, signal.SIGTERM)
    while (left := _processes(head)) and time.monotonic() < gone_by:
        time.sleep(0.05)
    for process in left:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(left, timeout=STOP_SECONDS)
    shutil.rmtree(head.folder, ignore_errors=True)


def is_running(head: RayHead) -> bool:
    return bool(_processes(head))


def _processes(head: RayHead) -> list[psutil.Process]:
    """Of the head's session; not those of a later session that was given the same number."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == head.session:
                words = process.cmdline()
                if any(head.folder in word or word.startswith("ray::") for word in words):
                    found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, PermissionError):
            continue
    return found


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        log.debug("process %d is gone", process.pid)
