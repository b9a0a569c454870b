"""GPUs: what Ray and the driver say of them, and which ranks get them. No GPU, no Ray."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from flm.cluster.control.inventory import nodes_of, rank_resources
from flm.cluster.control.placement import Group, Node, place
from flm.cluster.launch.joined_ray import machine_of
from flm.cluster.planning import plan
from flm.cluster.planning.demand import Demand
from flm.cluster.planning.plan import plan_demands
from flm.cluster.planning.shapes import read_shapes
from flm.cluster.settings.hardware import KNOWN_GPUS, Hardware, Machine
from flm.kernels.cuda import cublas_lt, inventory
from flm.kernels.cuda.inventory import VisibleGpu, gpus_of
from flm.worker.errors import ConfigError, DoesNotFit
from flm.worker.execution.device_support import missing_on_gpus

GIB = 1 << 30


def record(name: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": name, "NodeManagerAddress": f"ip-{name}", "Alive": alive, "Resources": resources}


def test_nodes_are_read_from_rays_records() -> None:
    records = [
        record("a", CPU=8, memory=GIB, GPU=2, **{"accelerator_type:H100": 1}),
        record("b", CPU=4, memory=GIB),
        record("head", memory=GIB),
        record("gone", alive=False, CPU=8),
    ]
    assert nodes_of(records) == [Node("a", "ip-a", 8, GIB, 2, "H100"), Node("b", "ip-b", 4, GIB)]


def test_ranks_reserve_whole_gpus() -> None:
    assert rank_resources("cuda")["num_gpus"] == 1
    assert rank_resources("cpu")["num_gpus"] == 0


def test_gpus_count_only_where_cupy_is_installed() -> None:
    node = Node("a", "ip-a", 8, GIB, 2, "H100")
    assert machine_of(node, True) == Machine("ip-a", 8, GIB, gpus=2, gpu=KNOWN_GPUS["h100"])
    assert machine_of(node, False).gpus == 0
    assert machine_of(Node("a", "ip-a", 8, GIB, 2, "Unheard"), True).gpu is None


def test_visible_gpus_are_those_that_the_kernels_run_on() -> None:
    facts = {"name": b"New", "totalGlobalMem": 80 * GIB, "memoryClockRate": 2_619_000, "memoryBusWidth": 5120}
    cards = [facts | {"major": 9, "minor": 0}, facts | {"name": b"Old", "major": 7, "minor": 5}]
    runtime = SimpleNamespace(
        getDeviceCount=lambda: 2, getDeviceProperties=cards.__getitem__, CUDARuntimeError=RuntimeError
    )
    assert gpus_of(runtime) == [VisibleGpu("New", 80 * GIB, pytest.approx(3.35e12, rel=1e-2))]

    def no_driver() -> int:
        raise RuntimeError("cudaErrorInsufficientDriver")

    assert gpus_of(SimpleNamespace(getDeviceCount=no_driver, CUDARuntimeError=RuntimeError)) == []


def test_a_group_on_gpus_takes_whole_ones_of_one_node_and_leaves_large_gaps() -> None:
    nodes = [Node("a", "a", 4, GIB, 4), Node("b", "b", 4, GIB, 2), Node("c", "c", 64, 999 * GIB)]
    groups = [Group("m-0", 2, 70 * GIB, True), Group("m-1", 3, 70 * GIB, True), Group("cpu", 1, GIB // 2)]
    chosen = place(groups, nodes, {})
    assert (chosen["m-0"], chosen["m-1"]) == ("b", "a")
    with pytest.raises(DoesNotFit, match=r"a: needs 2 GPUs, 1 of 4 are free; b: needs 2 GPUs, 0 of 2"):
        place([*groups, Group("m-2", 2, GIB, True)], nodes, chosen)


def devices(path: str, wanted: str, *machines: Machine, measured: bool = True) -> tuple[set[str], bool]:
    """Where the ranks of one model would compute, and whether nothing but room stands in the way."""
    plan = plan_demands([Demand("m", path, wanted)], Hardware(machines, measured))
    return {rank.device for model in plan.models for rank in model.ranks}, not plan.obstacles


def test_device_auto_means_gpus_that_can_run_the_model() -> None:
    gpu = Machine("n", 4, 99 * GIB, gpus=1, gpu=KNOWN_GPUS["h100"])
    cpu = Machine("n", 4, 99 * GIB)
    golden = "tests/data/golden"
    assert devices(f"{golden}/llama31", "auto", gpu) == ({"cuda"}, True)
    assert devices(f"{golden}/llama31", "auto", cpu) == ({"cpu"}, True)
    assert devices(f"{golden}/llama31", "cpu", gpu) == ({"cpu"}, True)


def test_what_gpus_cannot_run_is_said_or_runs_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Machine("n", 4, 99 * GIB, gpus=1, gpu=KNOWN_GPUS["h100"])
    path = "tests/data/golden/llama31"
    wide = lambda config: replace(config, attention=replace(config.attention, head_dim=512))
    assert missing_on_gpus(wide(read_shapes(path).config)) == "heads wider than 256"
    monkeypatch.setattr(plan, "missing_on_gpus", lambda config: missing_on_gpus(wide(config)))
    assert devices(path, "auto", gpu) == ({"cpu"}, True)
    assert devices(path, "cuda", gpu) == ({"cuda"}, False)


def test_a_cache_that_the_device_cannot_have_is_refused() -> None:
    for device, activations, kv_dtype, words in (
        ("cpu", "auto", "int8", "expected auto, float32 or float16 on cpu, got int8"),
        ("cuda", "float16", "bfloat16", "expected auto, float16 or int8 on cuda, got bfloat16"),
        ("cpu", "float16", "auto", "expected auto on cpu, which computes in float32, got float16"),
    ):
        demand = Demand("m", "tests/data/golden/llama31", device, activations=activations, kv_dtype=kv_dtype)
        with pytest.raises(ConfigError, match=words):
            plan_demands([demand], Hardware((Machine("n", 4, GIB),)))


def test_products_by_cublas_are_planned_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path, gpu = "tests/data/golden/llama31", Machine("n", 4, 99 * GIB, gpus=1, gpu=KNOWN_GPUS["h100"])
    plain, fast = (Demand("m", path, "cuda", matmul=matmul) for matmul in ("exact", "cublas"))
    monkeypatch.setattr(plan, "missing_cublas", lambda: "matmul: cublas needs a library")
    for measured, obstacles in ((False, ()), (True, ("model m: matmul: cublas needs a library",))):
        exact, quick = (plan_demands([d], Hardware((gpu,), measured)) for d in (plain, fast))
        assert (exact.obstacles, quick.obstacles) == ((), obstacles)
        assert quick.models[0].rank_parts[2] - exact.models[0].rank_parts[2] == 288 << 20
        assert ["cuBLAS" in str(each.table().title) for each in (exact, quick)] == [False, True]
    with pytest.raises(ConfigError, match="matmul: expected exact on cpu, got cublas"):
        plan_demands([replace(fast, device="cpu")], Hardware((gpu,)))


def test_a_missing_cublas_is_told_where_cupy_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = SimpleNamespace(runtime=SimpleNamespace(runtimeGetVersion=lambda: 12090))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cupy))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cupy)
    monkeypatch.setattr(cublas_lt, "find_library", {12: None, 13: "somewhere"}.get)
    for installed, words in ((False, ""), (True, "libcublasLt.so.12")):
        monkeypatch.setattr(inventory, "installed", lambda there=installed: there)
        assert words in inventory.missing_cublas()
        assert bool(inventory.missing_cublas()) is installed
    monkeypatch.setattr(cupy.runtime, "runtimeGetVersion", lambda: 13000)
    assert inventory.missing_cublas() == ""
