"""Mixtures of experts through the command line: two models of two ranks each, every rank with its own experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_cluster import Cluster, flm_cluster, free_address
from tokenizers import Tokenizer, models, pre_tokenizers

from flm.cluster.client import Client, Sampling
from flm.worker import Engine, SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
GOLDEN = Path(__file__).parent.parent / "data" / "golden"
MODELS = ("deepseek_v2", "qwen3_moe")
PROMPT = [5, 17, 40, 8, 61, 33, 90]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("experts")
    gateway, admin = free_address(), free_address()
    lines = ["name: experts", f'gateway: {{listen: "{gateway}"}}', f'admin: {{listen: "{admin}"}}', "models:"]
    for name in MODELS:
        with_words(shutil.copytree(GOLDEN / name, folder / name))
        lines.append(
            f"  - {{name: {name}, path: {name}, tensor_parallel: 2, expert_parallel: true, max_context: 64, "
            "kv_cache: {memory: 1MiB}}"
        )
    (folder / "cluster.yaml").write_text("\n".join(lines))
    up = flm_cluster("up", str(folder / "cluster.yaml"), "--detach", state=folder, timeout=220)
    assert up.returncode == 0, up.stdout + up.stderr
    running = Cluster(folder, gateway, admin)
    yield running
    down = running.run("down", timeout=120)
    assert down.returncode == 0, down.stdout + down.stderr


def with_words(directory: Path) -> None:
    """Give a checkpoint of 96 tokens a tokenizer, which golden ones lack."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(directory / "tokenizer.json"))


def reports(cluster: Cluster) -> dict[str, dict]:
    """The one replica of each model, as `status --json` has it."""
    status = cluster.run("status", "--json")
    assert status.returncode == 0, status.stderr
    return {model["name"]: model["replicas"][0] for model in json.loads(status.stdout)["models"]}


@pytest.mark.parametrize("name", MODELS)
def test_served_tokens_are_the_engines_own(cluster: Cluster, name: str) -> None:
    with Engine(GOLDEN / name, tensor_parallel=2, expert_parallel=True, max_sequences=4) as engine:
        (want,) = engine.generate([PROMPT], SamplingParams(max_tokens=24, temperature=0, ignore_eos=True))
    sampling = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
    with Client(cluster.gateway) as client:
        frames = list(client.generate(PROMPT, sampling, model=name, timeout=60))
    assert tuple(token for frame in frames for token in frame.token_ids) == want.token_ids


def test_tokens_of_every_expert_are_reported(cluster: Cluster) -> None:
    def counted() -> bool:
        found = reports(cluster)
        sums = [sum(map(int, layer["tokens"])) for name in MODELS for layer in found[name]["experts"]]
        return len(sums) == 2 + 3 and all(total >= 3 * (len(PROMPT) + 23) for total in sums)

    cluster.wait(counted)  # heartbeats tell
    assert "the hottest expert is" in cluster.run("status").stdout
