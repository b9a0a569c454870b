"""Watch a cluster that was started until it serves, with a bar for each rank."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from flm.cluster.cli.interrupts import Interrupts
from flm.proto import flm_pb2
from flm.worker.errors import FlmError, Unavailable

if TYPE_CHECKING:
    from rich.console import Console

    from flm.cluster.state import Endpoint

CONTROLLER_SECONDS = 60.0  # until the controller answers: its process imports for seconds on a busy machine
STILL_SECONDS = (
    240.0  # without any progress; a replica's own bound, which says more, is reconcile.MAX_STARTING
)
LOOK = 0.1


def await_ready(endpoint: Endpoint, console: Console, interrupts: Interrupts) -> None:
    """Return when all replicas and the gateway are ready. FlmError where one fails; Unavailable where nothing
    advances any more."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from flm.cluster.client.admin_client import AdminClient

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    tasks: dict[str, TaskID] = {}
    patience = Patience(STILL_SECONDS, time.monotonic())
    with (
        AdminClient(endpoint.admin, endpoint.admin_key, CONTROLLER_SECONDS) as client,
        Progress(*columns, console=console) as bars,
    ):
        while True:
            status = client.status()
            interrupts.check()
            for name, fraction in fractions(status).items():
                if name not in tasks:
                    tasks[name] = bars.add_task(name, total=1.0)
                bars.update(tasks[name], completed=fraction)
            refuse_failures(status)
            if is_ready(status):
                return
            patience.look(status, time.monotonic())
            time.sleep(LOOK)


def fractions(status: flm_pb2.ClusterStatus) -> dict[str, float]:
    """How much of its weights each rank has loaded."""
    replicas = [replica for model in status.models for replica in model.replicas]
    return {f"{r.replica_id} rank {rank.rank}": rank.load_fraction for r in replicas for rank in r.ranks}


def refuse_failures(status: flm_pb2.ClusterStatus) -> None:
    for replica in (replica for model in status.models for replica in model.replicas):
        if replica.message:
            raise FlmError(f"replica {replica.replica_id} failed: {replica.message}")
    if status.gateway_message:
        raise FlmError(f"the gateway failed: {status.gateway_message}")


def is_ready(status: flm_pb2.ClusterStatus) -> bool:
    return status.gateway_ready and all(m.ready_replicas >= m.wanted_replicas for m in status.models)


class Patience:
    """Ends when a cluster that starts has not come further for `seconds`. What it already had does not count again:
    a process that dies and is started over and over makes no progress."""

    def __init__(self, seconds: float, now: float) -> None:
        self._seconds, self._advanced = seconds, now
        self._seen: set[str] = set()

    def look(self, status: flm_pb2.ClusterStatus, now: float) -> None:
        """Unavailable, saying what is missing, where nothing is new for too long."""
        states = {r.replica_id: r.state for model in status.models for r in model.replicas}
        reached = {f"{name} at {fraction:.2f}" for name, fraction in fractions(status).items()}
        reached |= {f"{replica_id} is {state}" for replica_id, state in states.items()}
        reached |= {"gateway"} if status.gateway_ready else set()
        if reached - self._seen:
            self._seen |= reached
            self._advanced = now
        elif now - self._advanced > self._seconds:
            ready = flm_pb2.REPLICA_STATE_READY
            missing = [replica_id for replica_id, state in states.items() if state != ready]
            missing += [] if status.gateway_ready else ["the gateway"]
            what = ", ".join(missing) or "replicas that are wanted"
            raise Unavailable(f"nothing has come further for {self._seconds:g} s; not ready: {what}")
