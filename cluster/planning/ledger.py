"""Where a plan puts ranks, and what each node is then short of. An estimate: the controller places by what it sees."""

from __future__ import annotations

from flm.cluster.planning.demand import RankSize
from flm.cluster.settings.hardware import Machine
from flm.cluster.settings.units import format_bytes


class NodeLedger:
    """What one node has promised so far. Ranks on CPUs may share cores between replicas, but a replica wants as many
    cores as it has ranks; a GPU belongs to one rank."""

    def __init__(self, node: Machine) -> None:
        self.node, self.memory_used, self.gpus_used = node, 0, 0
        self._tight: list[str] = []

    @property
    def memory_free(self) -> int:
        return self.node.memory - self.memory_used

    @property
    def gpus_free(self) -> int:
        return self.node.gpus - self.gpus_used

    def has_room(self, device: str, sizes: list[RankSize]) -> bool:
        if device == "cuda":
            return len(sizes) <= self.gpus_free
        return len(sizes) <= self.node.cpus and sum(size.total_bytes for size in sizes) <= self.memory_free

    def add(self, model: str, rank: int, device: str, size: RankSize) -> None:
        if device == "cpu":
            self.memory_used += size.total_bytes
            return
        self.gpus_used += 1
        gpu = self.node.gpu
        limit = int(gpu.memory * size.gpu_share) if gpu else 0
        if gpu and size.total_bytes > limit:
            self._tight.append(
                f"node {self.node.name}: model {model} rank {rank} needs {format_bytes(size.total_bytes)} on one "
                f"{gpu.kind}, {format_bytes(size.total_bytes - limit)} more than the {format_bytes(limit)} it may fill"
            )

    def problems(self) -> list[str]:
        """What this node is short of, one sentence each."""
        found = list(self._tight)
        if self.memory_free < 0:
            found.append(
                f"node {self.node.name}: short of {format_bytes(-self.memory_free)} of memory; "
                f"{format_bytes(self.memory_used)} needed, {format_bytes(self.node.memory)} there"
            )
        return found


def place_replica(
    model: str, replica: int, device: str, sizes: list[RankSize], ledgers: list[NodeLedger]
) -> tuple[list[NodeLedger], str]:
    """The node of all ranks, once for each: the one with room, of GPUs the tightest. Books them, and returns them with what
    is missing ("" where nothing is)."""
    fitting = [ledger for ledger in ledgers if ledger.has_room(device, sizes)]
    if device == "cuda":
        if not fitting:
            return [], _short_of_gpus(f"model {model} replica {replica}", len(sizes), ledgers)
        chosen, problem = min(fitting, key=lambda ledger: ledger.gpus_free), ""
    else:
        chosen, problem = max(fitting or ledgers, key=lambda ledger: ledger.memory_free), ""
        best = max(ledgers, key=lambda ledger: ledger.node.cpus).node
        if len(sizes) > best.cpus:
            problem = (
                f"model {model}: tensor_parallel {len(sizes)} needs as many cores on one machine; "
                f"{best.name} has {best.cpus}"
            )
    for rank, size in enumerate(sizes):
        chosen.add(model, rank, device, size)
    return [chosen] * len(sizes), problem


def _short_of_gpus(who: str, wanted: int, ledgers: list[NodeLedger]) -> str:
    free, best = sum(each.gpus_free for each in ledgers), max(ledgers, key=lambda each: each.gpus_free)
    if free < wanted:
        return f"{who}: short of {wanted - free} GPUs; {wanted} needed, {free} free of {sum(l.node.gpus for l in ledgers)}"
    return (
        f"{who}: {wanted} GPUs of one node needed, for the ranks of a replica stay on one; {best.node.name} has the most "
        f"free, {best.gpus_free}; lower tensor_parallel"
    )
