"""What a cluster.yaml needs, worked out before anything starts: memory per rank, KV tokens, concurrency, speed.

Pure given the checkpoints' headers and the hardware. All figures are estimates: weights and KV cache are counted as the
engine lays them out, a fixed allowance stands for a process' code and activations, and speeds are rooflines: the bytes
that one token must read, over memory bandwidth.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from flm.cluster.planning.demand import Demand, RankSize, check_cut, context, rank_sizes
from flm.cluster.planning.ledger import NodeLedger, place_replica
from flm.cluster.planning.shapes import Shapes, read_shapes
from flm.cluster.settings.config import ClusterConfig, ModelSection
from flm.cluster.settings.hardware import Hardware, measure_hardware, named_hardware
from flm.cluster.settings.units import format_bytes, format_count
from flm.cluster.state import ModelFacts
from flm.kernels.cuda.inventory import missing_cublas
from flm.worker.errors import CheckpointError, ConfigError, DoesNotFit
from flm.worker.execution.device_support import missing_on_gpus

COLUMNS = ("model", "rank", "node", "weights", "KV", "KV tokens", "full contexts", "tok/s")


@dataclass(frozen=True)
class RankPlan:
    """One rank of one replica; node and device are empty where there is no place for it."""

    replica: int
    rank: int
    node: str
    device: str
    weight_bytes: int
    kv_bytes: int
    total_bytes: int
    adapter_bytes: int


@dataclass(frozen=True)
class ModelPlan:
    """One model. KV figures are those of each rank: a token's KV is spread over the ranks of a replica."""

    name: str
    architecture: str
    parameters: int
    precision: str
    replicas: int
    tensor_parallel: int
    device: str  # cpu or cuda, of every rank
    matmul: str  # exact or cublas
    rank_bytes: int  # of the largest rank
    rank_parts: tuple[int, int, int]  # weights, KV cache and all else, of the rank with the most weights
    vocab: int
    eos_token_ids: tuple[int, ...]
    max_context: int
    kv_bytes_per_token: int
    kv_tokens: int
    concurrency: int  # sequences of max_context at once, per replica
    tokens_per_second: float | None  # roofline of one sequence; None where the bandwidth is unknown
    ranks: tuple[RankPlan, ...]


@dataclass(frozen=True)
class Plan:
    """`problems` say what is short of what. `obstacles` do not concern sizes: reasons why `up` would fail all the same
    (no weights in the directory, a family not served yet)."""

    models: tuple[ModelPlan, ...]
    hardware: Hardware
    problems: tuple[str, ...] = ()
    obstacles: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.problems

    def require_servable(self) -> None:
        """Raises DoesNotFit with every problem and obstacle, where there is one."""
        if self.problems or self.obstacles:
            raise DoesNotFit("; ".join(self.problems + self.obstacles))

    def facts(self) -> dict[str, ModelFacts]:
        """What those that start the models need not read of their checkpoints again."""
        return {
            model.name: ModelFacts(
                rank_memory=model.rank_bytes,
                planned=model.rank_parts,
                max_context=model.max_context,
                architecture=model.architecture,
                precision=model.precision,
                device=model.device,
                rows=model.vocab,
                eos_token_ids=model.eos_token_ids,
            )
            for model in self.models
        }

    def table(self) -> Table:
        """A table for people: one row per rank; what concerns a whole replica stands at its rank 0."""
        source = "measured here" if self.hardware.measured else "as named in the file"
        models = [
            f"{m.name}: {format_count(m.parameters)} parameters, {m.precision}{_with_adapters(m)}{_by_cublas(m)}"
            for m in self.models
        ]
        title = "\n".join([f"Plan for hardware {source}; all figures are estimates.", *models])
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in COLUMNS:
            left, two_words = heading in COLUMNS[:3], " " in heading  # which may stand in two lines
            table.add_column(heading, justify="left" if left else "right", no_wrap=not two_words)
        for model in self.models:
            speed = f"{model.tokens_per_second:,.0f}" if model.tokens_per_second else "?"
            whole = (f"{model.kv_tokens:,}", f"{model.concurrency}×{model.max_context:,}", speed)
            for rank in model.ranks:
                first = rank.rank == 0
                table.add_row(
                    model.name if first and rank.replica == 0 else "",
                    f"{rank.replica}.{rank.rank}",
                    f"{rank.node} {rank.device}" if rank.node else "nowhere",
                    format_bytes(rank.weight_bytes + rank.adapter_bytes),
                    format_bytes(rank.kv_bytes),
                    *(whole if first else ("", "", "")),
                )
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain data for scripts; sizes in bytes, bandwidths in bytes/s. Every figure is an estimate."""
        nodes = [asdict(node) for node in self.hardware.nodes]
        return {
            "estimate": True,
            "fits": self.fits,
            "problems": list(self.problems),
            "obstacles": list(self.obstacles),
            "models": [asdict(model) for model in self.models],
            "hardware": {"measured": self.hardware.measured, "nodes": nodes},
        }


def _with_adapters(model: ModelPlan) -> str:
    """What of the ranks' weights is adapters; empty where there are none."""
    most = max((rank.adapter_bytes for rank in model.ranks), default=0)
    return f", and {format_bytes(most)} of adapters a rank" if most else ""


def _by_cublas(model: ModelPlan) -> str:
    return "; long prompts multiplied by cuBLAS" if model.matmul == "cublas" else ""


def plan_cluster(config: ClusterConfig, hardware: Hardware | None = None) -> Plan:
    """The plan of a whole cluster.yaml: for `hardware`, else for what the file names, else for this machine.

    Raises ConfigError where a model's shapes cannot be read, or where it cannot be cut as asked."""
    if hardware is None:
        hardware = named_hardware(config.hardware) if config.hardware else measure_hardware()
    return plan_demands([demand_of(model) for model in config.models], hardware)


def demand_of(model: ModelSection) -> Demand:
    """What the YAML's model asks for."""
    return Demand(
        name=model.name,
        path=model.path,
        device=model.device,
        tensor_parallel=model.tensor_parallel,
        expert_parallel=model.expert_parallel,
        replicas=model.replicas.start,
        quantization=model.quantization,
        activations=model.activations,
        matmul=model.matmul,
        kv_dtype=model.kv_cache.dtype,
        kv_memory=model.kv_cache.memory,
        gpu_memory=model.gpu_memory,
        max_context=model.max_context,
        max_sequences=model.max_sequences,
        adapters=model.adapter_sources,
    )


def plan_demands(demands: list[Demand], hardware: Hardware) -> Plan:
    """Place every replica of every demand, in order, and add up what each node must hold."""
    ledgers = [NodeLedger(node) for node in hardware.nodes]
    models: list[ModelPlan] = []
    problems: list[str] = []
    obstacles: list[str] = []
    for index, demand in enumerate(demands):
        try:
            shapes = read_shapes(demand.path)
        except CheckpointError as error:
            raise ConfigError(str(error), field=f"models[{index}].path") from error
        missing_there = missing_on_gpus(shapes.config) if hardware.measured else ""
        if demand.device == "auto":
            demand = replace(demand, device=_device(hardware, missing_there))
        elif demand.device == "cuda" and missing_there:
            obstacles.append(
                f"model {demand.name}: no kernels for {missing_there} on GPUs yet; expected device: cpu"
            )
        by_cublas = demand.matmul == "cublas" and demand.device == "cuda" and hardware.measured
        if by_cublas and (lacking := missing_cublas()):
            obstacles.append(f"model {demand.name}: {lacking}")
        gpus = [node.gpu.memory for node in hardware.nodes if node.gpu is not None]
        demand = replace(demand, gpu_bytes=min(gpus, default=0))
        try:
            model, missing = _plan_model(demand, shapes, ledgers)
        except ConfigError as error:
            raise ConfigError(error.message, field=f"models[{index}].{error.field}") from None
        except CheckpointError as error:
            raise ConfigError(str(error), field=f"models[{index}].adapters") from error
        models.append(model)
        if demand.device == "cuda" and hardware.no_gpus:
            missing = [f"{problem} ({hardware.no_gpus})" for problem in missing]
        problems += missing
        obstacles += [f"model {demand.name}: {shapes.unservable}"] if shapes.unservable else []
    problems += [problem for ledger in ledgers for problem in ledger.problems()]
    return Plan(tuple(models), hardware, tuple(dict.fromkeys(problems)), tuple(obstacles))


def _device(hardware: Hardware, missing_there: str) -> str:
    """Of device auto: GPUs where there are any that can run the model."""
    return "cuda" if any(node.gpus for node in hardware.nodes) and not missing_there else "cpu"


def _plan_model(demand: Demand, shapes: Shapes, ledgers: list[NodeLedger]) -> tuple[ModelPlan, list[str]]:
    check_cut(demand, shapes)
    sizes, kv = rank_sizes(demand, shapes)
    ranks: list[RankPlan] = []
    problems: list[str] = []
    speed: float | None = None
    for replica in range(demand.replicas):
        places, problem = place_replica(demand.name, replica, demand.device, sizes, ledgers)
        problems += [problem] if problem else []
        speed = _roofline(demand.device, places, sizes) if replica == 0 else speed
        for rank, size in enumerate(sizes):
            node = places[rank].node.name if places else ""
            ranks.append(_rank_plan(replica, rank, node, demand.device, size))
    if not kv.concurrency:
        problems.append(
            f"model {demand.name}: the KV cache of each rank holds {kv.tokens:,} tokens, less than one sequence of "
            f"max_context {context(demand, shapes):,}; give kv_cache.memory more or lower max_context"
        )
    precision = shapes.precision if demand.quantization == "auto" else demand.quantization
    plan = ModelPlan(
        name=demand.name,
        architecture=shapes.config.family,
        parameters=shapes.parameters,
        precision=precision,
        replicas=demand.replicas,
        tensor_parallel=demand.tensor_parallel,
        device=demand.device,
        matmul=demand.matmul,
        rank_bytes=max(size.total_bytes for size in sizes),
        rank_parts=_parts(max(sizes, key=lambda size: size.weight_bytes)),
        vocab=shapes.config.vocab,
        eos_token_ids=shapes.config.eos_token_ids,
        max_context=context(demand, shapes),
        kv_bytes_per_token=kv.bytes_per_token,
        kv_tokens=kv.tokens,
        concurrency=kv.concurrency,
        tokens_per_second=speed,
        ranks=tuple(ranks),
    )
    return plan, problems


def _parts(size: RankSize) -> tuple[int, int, int]:
    """Bytes of weights, KV cache and all else."""
    return size.weight_bytes, size.kv_bytes, size.total_bytes - size.weight_bytes - size.kv_bytes


def _rank_plan(replica: int, rank: int, node: str, device: str, size: RankSize) -> RankPlan:
    sizes = (size.weight_bytes, size.kv_bytes, size.total_bytes, size.adapter_bytes)
    return RankPlan(replica, rank, node, device, *sizes)


def _roofline(device: str, places: list[NodeLedger], sizes: list[RankSize]) -> float | None:
    """Tokens/s of one sequence with an empty context: ranks wait for the slowest; ranks on CPUs share their node's
    bandwidth."""
    seconds = 0.0
    for ledger in places:
        if device == "cuda":
            bandwidth = ledger.node.gpu.bandwidth if ledger.node.gpu else 0.0
            load = max(size.read_bytes for size, other in zip(sizes, places, strict=True) if other is ledger)
        else:
            bandwidth = ledger.node.memory_bandwidth
            load = sum(size.read_bytes for size, other in zip(sizes, places, strict=True) if other is ledger)
        if not bandwidth:
            return None
        seconds = max(seconds, load / bandwidth)
    return 1 / seconds if seconds else None
