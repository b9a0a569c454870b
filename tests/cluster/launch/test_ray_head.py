"""Ending a head ends its processes, willing or not, and no others."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from flm.cluster.launch.ray_head import RayHead, end_head, is_running

# A session with two members that know the folder: one heeds SIGTERM, the other does not.
SESSION = """
import signal, subprocess, sys, time
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", stubborn, sys.argv[1]])
time.sleep(60)
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SESSION, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def test_exactly_the_heads_processes_end(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    mine, other = start(ours), start(theirs)
    head, neighbour = RayHead("", str(ours), mine.pid), RayHead("", str(theirs), other.pid)
    try:
        assert is_running(head)
        began = time.monotonic()
        end_head(head)
        assert time.monotonic() - began < 30
        mine.wait(30)
        assert not is_running(head)
        assert not ours.exists()
        assert is_running(neighbour)
        assert theirs.exists()
    finally:
        end_head(neighbour)
        for process in (mine, other):
            process.wait(30)
            assert process.stdout is not None
            process.stdout.close()


def test_a_session_number_that_passed_on_to_others_is_left_alone(tmp_path: Path) -> None:
    other = start(tmp_path)
    try:
        stale = RayHead("", str(tmp_path / "flm-ray-before-the-reboot"), other.pid)
        assert not is_running(stale)
        end_head(stale)
        assert other.poll() is None
    finally:
        end_head(RayHead("", str(tmp_path), other.pid))
        other.wait(30)
        assert other.stdout is not None
        other.stdout.close()
