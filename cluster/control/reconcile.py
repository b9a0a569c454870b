"""What to do next so that what runs becomes what is wanted. Pure: the clock is an argument.

`reconcile` looks at one instant and may be called as often as one likes: an action that was carried out shows in the
next observation, and is not asked for again. Replicas that drain count neither as wanted nor as surplus: what takes
their place starts beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from flm.cluster.settings.config import DRAIN_TIMEOUT
from flm.worker.limits import HANG_TIMEOUT

MAX_SILENCE = 10.0  # seconds without an answered heartbeat
MIN_MISSED = 5  # and so many unanswered ones in a row: an observer that was held up itself proves nothing
LEADER_FIRST = 1.0  # seconds that a leader gets past its own bound on a step, for it knows the rank to blame
MAX_STARTING = 180.0  # seconds without progress while starting
QUICK = 60.0  # a group that fails before it was ready for so long fails quickly
MAX_QUICK = 5  # quick failures in a row before it is retried slowly
SLOW_RETRY = 60.0
GIVE_UP = 10  # quick failures in a row, after which only an operator has it started again; a hopeless one counts as all
DRAIN_SETTLE = 0.5  # seconds for requests that were on their way when draining began


class Phase(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"  # nothing of it runs; waits to be started again


@dataclass(frozen=True)
class ModelTarget:
    model: str
    replicas: int
    drain_timeout: float = DRAIN_TIMEOUT
    hang_timeout: float = HANG_TIMEOUT


@dataclass(frozen=True)
class ReplicaView:
    """One replica as last observed. Durations in seconds."""

    replica_id: str
    model: str
    phase: Phase
    since: float  # when the phase began
    fault: str = ""  # a rank that died, a load that failed, a leader that gave up: names the rank
    hopeless: bool = False  # the fault would come again, here and wherever else there is room
    silence: float = 0.0  # since the last answered heartbeat
    missed: int = 0  # heartbeats unanswered in a row
    stuck: float = (
        0.0  # seconds in one engine step without a sign of life, or without any step while there is work
    )
    stalled: float = 0.0  # since loading last advanced
    outstanding: int = 0  # tokens still to compute
    idle: bool = False  # no requests at all
    failures: int = 0  # quick ones in a row


@dataclass(frozen=True)
class StartReplica:
    replica_id: str
    model: str


@dataclass(frozen=True)
class DrainReplica:
    replica_id: str


@dataclass(frozen=True)
class StopReplica:
    """End it for good: it has drained, its time to drain is over, or it never served."""

    replica_id: str
    reason: str


@dataclass(frozen=True)
class KillReplica:
    """End every rank of a broken group now; it will be started again."""

    replica_id: str
    reason: str


Action = StartReplica | DrainReplica | StopReplica | KillReplica


def retry_delay(failures: int) -> float:
    """Seconds to wait before a group is started again: at once after one failure, then 1, 2, 4, and a minute."""
    if failures >= MAX_QUICK:
        return SLOW_RETRY
    return 0.0 if failures <= 1 else float(2 ** (failures - 2))


def told_of_failure(view: ReplicaView, failures: int, reason: str) -> str:
    """What operators read of a group that failed."""
    if failures < GIVE_UP:
        return reason
    times = "for a reason that stays" if view.hopeless else f"{failures} times in a row"
    return f"{reason} (failed {times}; given up: `flm-cluster restart {view.replica_id}` tries again)"


def count_failure(view: ReplicaView, now: float) -> int:
    """`failures` of a group that fails now."""
    if view.hopeless:
        return GIVE_UP
    lasted = view.phase in (Phase.READY, Phase.DRAINING) and now - view.since >= QUICK
    return 1 if lasted else view.failures + 1


def fault_of(view: ReplicaView, hang_timeout: float) -> str:
    """Why the group has to go, or "". Being busy is no fault: only silence, or a step that does not end."""
    if view.phase is Phase.FAILED:
        return ""
    if view.fault:
        return view.fault
    if view.phase is Phase.STARTING:
        return f"made no progress for {view.stalled:.0f} s" if view.stalled > MAX_STARTING else ""
    if view.silence > MAX_SILENCE and view.missed >= MIN_MISSED:
        return f"rank 0 has not answered for {view.silence:.0f} s"
    return (
        f"has not finished a step for {view.stuck:.0f} s" if view.stuck > hang_timeout + LEADER_FIRST else ""
    )


def reconcile(targets: Sequence[ModelTarget], replicas: Sequence[ReplicaView], now: float) -> list[Action]:
    """The actions of this instant. Replicas of models that are not targets are drained and stopped."""
    by_model = {target.model: target for target in targets}
    for replica in replicas:
        by_model.setdefault(replica.model, ModelTarget(replica.model, 0))
    actions: list[Action] = []
    for target in by_model.values():
        actions += _reconcile_model(target, [r for r in replicas if r.model == target.model], now)
    return actions


def _reconcile_model(target: ModelTarget, replicas: Sequence[ReplicaView], now: float) -> Iterator[Action]:
    counted = [r for r in replicas if r.phase is not Phase.DRAINING]
    counted.sort(key=lambda replica: _dispensable(replica, target.hang_timeout))
    surplus = counted[: max(0, len(counted) - target.replicas)]
    for replica in replicas:
        fault = fault_of(replica, target.hang_timeout)
        if replica.phase is Phase.DRAINING:
            yield from _end_of_drain(replica, fault, target.drain_timeout, now)
        elif replica in surplus:
            yield _dismiss(replica, fault)
        elif fault:
            yield KillReplica(replica.replica_id, fault)
        elif replica.phase is Phase.FAILED and _is_due(replica, now):
            yield StartReplica(replica.replica_id, target.model)
    taken = {r.replica_id for r in replicas}
    free = (f"{target.model}-{i}" for i in range(len(taken) + target.replicas))
    unused = (replica_id for replica_id in free if replica_id not in taken)
    for _ in range(target.replicas - len(counted)):
        yield StartReplica(next(unused), target.model)


def _is_due(replica: ReplicaView, now: float) -> bool:
    return replica.failures < GIVE_UP and now >= replica.since + retry_delay(replica.failures)


def _dispensable(replica: ReplicaView, hang_timeout: float) -> tuple[int, int, float]:
    """Sort key: who goes first when there are too many. Broken, then starting, then the least loaded; newest
    first."""
    rank = 2
    if replica.phase is Phase.FAILED or fault_of(replica, hang_timeout):
        rank = 0
    elif replica.phase is Phase.STARTING:
        rank = 1
    return rank, replica.outstanding, -replica.since


def _dismiss(replica: ReplicaView, fault: str) -> Action:
    if replica.phase is Phase.READY and not fault:
        return DrainReplica(replica.replica_id)
    return StopReplica(replica.replica_id, fault or "no longer wanted")


def _end_of_drain(replica: ReplicaView, fault: str, timeout: float, now: float) -> Iterator[Action]:
    waited = now - replica.since
    if fault:
        yield StopReplica(replica.replica_id, fault)
    elif replica.idle and waited >= DRAIN_SETTLE:
        yield StopReplica(replica.replica_id, "drained")
    elif waited >= timeout:
        yield StopReplica(replica.replica_id, f"not drained within {timeout:g} s; its streams move on")
