"""Adapters in cluster.yaml, in the plan, and in requests through a gateway."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_writer import GOLDEN, random_factors, write_adapter

from flm.cluster.client import AsyncClient, Sampling
from flm.cluster.control.group_spec import group_spec
from flm.cluster.gateway.served_model import served_model
from flm.cluster.planning.demand import Demand, rank_sizes
from flm.cluster.planning.plan import plan_cluster
from flm.cluster.planning.shapes import read_shapes
from flm.cluster.settings.config import parse_config
from flm.cluster.settings.hardware import Hardware, Machine
from flm.cluster.state import ModelFacts
from flm.worker.adapters.adapter import AdapterSource
from flm.worker.errors import AdapterNotFound, ConfigError

Start = Callable[..., Awaitable[Any]]
GIB = 1 << 30
LAPTOP = Hardware((Machine("laptop", 4, 64 * GIB),), measured=True)
LLAMA = str(GOLDEN / "llama31")
YAML = f"name: demo\nmodels:\n  - name: m\n    path: {LLAMA}\n    adapters: "


def test_the_yaml_names_adapters() -> None:
    (model,) = parse_config(YAML + "{sql: a/sql, poet: {path: /p, max_rank: 8}}", "/files/c.yaml").models
    sources = (AdapterSource("sql", "/files/a/sql"), AdapterSource("poet", "/p", 8))
    assert model.adapter_sources == sources
    facts = ModelFacts(rank_memory=1, max_context=64)
    assert group_spec(model, facts, "m-0", Path("/run")).adapters == sources
    assert served_model(model, facts).adapters == ("sql", "poet")


@pytest.mark.parametrize(
    ("value", "field", "expected"),
    [
        ("[a]", "adapters", "expected a valid dictionary"),
        ("{a/b: x}", r"adapters.a/b", "expected 1 to 63 letters"),
        ("{a: 3}", "adapters.a", "expected a directory, or {path: directory, max_rank: 64}, got 3"),
        ("{a: {path: x, rank: 3}}", "adapters.a", "expected a directory"),
        ("{a: {path: x, max_rank: 0}}", "adapters.a", "expected a directory"),
        ("{a: {max_rank: 4}}", "adapters.a", "expected a directory"),
    ],
)
def test_mistakes_are_named(value: str, field: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(YAML + value, "c.yaml")
    assert str(caught.value).startswith("c.yaml:5: models[0]." + field)
    assert expected in str(caught.value)


def test_the_plan_counts_adapters_and_refuses_those_of_other_models(tmp_path: Path) -> None:
    ranks = {"q_proj": 4, "down_proj": 4}
    write_adapter(tmp_path / "a", random_factors("llama31", ranks))
    demand = Demand("m", LLAMA, tensor_parallel=2, adapters=(AdapterSource("a", str(tmp_path / "a")),))
    sizes, _ = rank_sizes(demand, read_shapes(LLAMA))
    plain, _ = rank_sizes(Demand("m", LLAMA, tensor_parallel=2), read_shapes(LLAMA))
    assert sizes[0].adapter_bytes == 3 * 4 * (16 * 64 + 64 * 4 // 2 + 16 * 80 // 2 + 64 * 4)
    assert sizes[0].total_bytes == plain[0].total_bytes + sizes[0].adapter_bytes
    plan = plan_cluster(parse_config(YAML + "{a: a}", str(tmp_path / "c.yaml")), LAPTOP)
    assert plan.fits
    (rank,) = plan.models[0].ranks
    assert plan.to_json()["models"][0]["ranks"][0]["adapter_bytes"] == rank.adapter_bytes > 0
    assert str(plan.table().title).endswith("KiB of adapters a rank")
    write_adapter(tmp_path / "b", random_factors("deepseek_v2", ranks))
    with pytest.raises(
        ConfigError, match=r"models\[0\].adapters: .*adapter_model.safetensors: module .* is not in"
    ):
        plan_cluster(parse_config(YAML + "{b: b}", str(tmp_path / "c.yaml")), LAPTOP)


async def test_requests_choose_an_adapter(start_cluster: Start) -> None:
    cluster = await start_cluster()
    async with AsyncClient(cluster.address) as client:
        assert list((await client.model_info()).adapters) == ["sql", "poet"]
        for adapter in ("poet", ""):
            assert [f async for f in client.generate("hello", Sampling(n=2), adapter=adapter)]
            assert [f async for f in client.chat("hello", adapter=adapter)]
        for call in (client.generate, client.chat):
            with pytest.raises(
                AdapterNotFound, match="'x' is not served with this model; served adapters: poet, sql"
            ):
                _ = [f async for f in call("hello", adapter="x")]
    taken = [request.params.adapter for request in cluster.seats[0].replica.accepted]
    assert taken == ["poet"] * 3 + [""] * 3


async def test_a_moved_stream_keeps_its_adapter(
    start_cluster: Start, expected: Callable[..., list[int]]
) -> None:
    cluster = await start_cluster(2)
    for seat in cluster.seats:
        seat.replica.hold_after = 10
    async with AsyncClient(cluster.address) as client:
        stream = client.generate("hello", Sampling(seed=3), adapter="sql")
        frames = [await anext(stream)]
        first, second = sorted(
            (s.replica for s in cluster.seats), key=lambda r: len(r.accepted), reverse=True
        )
        first.fail("rank 0 was killed")
        second.hold_after = None
        frames += [f async for f in stream]
    assert [t for f in frames for t in f.token_ids] == expected(b"hello", 3)[:-1]
    assert frames[-1].restarts == 1
    assert [r.params.adapter for r in second.accepted] == ["sql"]
    assert second.accepted[0].resumed_ids
