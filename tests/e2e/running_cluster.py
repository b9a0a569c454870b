"""A cluster that runs in this machine's own processes, seen as its users and operators see it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from safetensors.numpy import save_file

from flm.cluster.client import Client
from flm.cluster.client.admin_client import AdminClient
from flm.proto import flm_pb2
from flm.worker.group.replica import IDLE_CHECK

MODEL, ADAPTER = "smollm2", "story"


def flm_cluster(*arguments: str, state: Path, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run one command as a user would."""
    return subprocess.run(
        [sys.executable, "-c", "from flm.cluster.cli import main; main()", *arguments],
        env={**os.environ, "XDG_STATE_HOME": str(state), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@dataclass(frozen=True)
class Cluster:
    state: Path
    gateway: str
    admin: str

    def run(self, *arguments: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        return flm_cluster(*arguments, state=self.state, timeout=timeout)

    def client(self) -> Client:
        return Client(self.gateway)

    def admin_client(self) -> AdminClient:
        return AdminClient(self.admin)

    def replicas(self) -> list[flm_pb2.ReplicaStatus]:
        with self.admin_client() as admin:
            return list(admin.status().models[0].replicas)

    def wait(self, condition: Callable[[], bool], seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s; replicas: {self.replicas()}"
            time.sleep(0.05)

    def wait_for_rebuilt(self, victim: flm_pb2.ReplicaStatus) -> flm_pb2.ReplicaStatus:
        """Until the controller has noticed what befell `victim`, started it once more and has all replicas ready again."""

        def found() -> flm_pb2.ReplicaStatus | None:
            return next((r for r in self.replicas() if r.replica_id == victim.replica_id), None)

        self.wait(lambda: (now := found()) is not None and now.restarts > victim.restarts)
        self.wait_until_whole()
        rebuilt = found()
        assert rebuilt is not None
        return rebuilt

    def wait_until_whole(self, replicas: int = 2, seconds: float = 90.0) -> None:
        """All replicas ready, none of them busy, every KV block free or cached."""

        def whole() -> bool:
            found = self.replicas()
            states = [r.state for r in found]
            idle = all(r.load.running == r.load.waiting == 0 for r in found)
            blocks = all(r.load.blocks_free + r.load.blocks_cached == r.load.blocks_total > 0 for r in found)
            return states == [flm_pb2.REPLICA_STATE_READY] * replicas and idle and blocks

        self.wait(whole, seconds)

    def check_blocks(self) -> None:
        """Every replica counts its blocks and slots once it was idle for a moment, and fails where one is missing."""
        before = [(r.replica_id, r.restarts) for r in self.replicas()]
        time.sleep(IDLE_CHECK + 1.0)  # and a heartbeat
        assert [(r.replica_id, r.restarts) for r in self.replicas()] == before
        self.wait_until_whole(len(before), 10.0)

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Processes of this cluster's Ray head whose command line contains `title`."""
        (endpoint,) = self.state.glob("flm-cluster/*/endpoint.json")
        session = json.loads(endpoint.read_text())["head_session"]
        return [p for p in of_session(session) if title in " ".join(p.cmdline())]


def adapter_of_smollm2(directory: Path) -> None:
    """A LoRA adapter with random factors, of a few modules in every layer."""
    directory.mkdir()
    rng, tensors = np.random.default_rng(3), {}
    for layer in range(30):
        for module, rows, cols in (("self_attn.q_proj", 576, 576), ("mlp.down_proj", 576, 1536)):
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = rng.standard_normal((4, cols)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = rng.standard_normal((rows, 4)).astype(np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 0.02}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def of_session(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            continue  # ended while we looked
    return found


def assert_ended(session: int) -> None:
    """No process of a session is left, or not for long."""
    deadline = time.monotonic() + 10
    while left := of_session(session):
        assert time.monotonic() < deadline, [process.cmdline() for process in left]
        time.sleep(0.1)


def free_address() -> str:
    """A loopback host:port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
