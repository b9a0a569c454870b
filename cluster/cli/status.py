"""`flm-cluster status`: a table people can read, or JSON that scripts can."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from flm.cluster.cli.options import AdminOption, ClusterOption, KeyOption, admin_client

if TYPE_CHECKING:
    from rich.table import Table

    from flm.proto import flm_pb2


def status(
    cluster: ClusterOption = "",
    address: AdminOption = "",
    api_key: KeyOption = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Show models, replicas and ranks."""
    with admin_client(cluster, address, api_key) as client:
        found = client.status()
    if as_json:
        from flm.cluster.cli.plain import plain

        print(json.dumps(plain(found), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(
        f"[bold]{found.name}[/]  up {duration(found.uptime)}, gateway {found.gateway_address}, ", end=""
    )
    console.print(f"admin {found.admin_address}, controller restarts {found.controller_restarts}")
    if not found.gateway_ready:
        console.print("[red]the gateway does not answer[/]")
        if found.gateway_message:
            console.print(found.gateway_message, soft_wrap=True, markup=False)
    console.print(table(found))
    for model in found.models:
        for replica in model.replicas:
            for line in (why_not_ready(replica), hottest_expert(replica)):
                if line:
                    console.print(f"{replica.replica_id}: {line}", soft_wrap=True, markup=False)


def table(found: flm_pb2.ClusterStatus) -> Table:
    """One row per replica; models without any get one too."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from flm.cluster.cli.plain import word
    from flm.cluster.settings.units import format_bytes
    from flm.proto import flm_pb2

    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits 80 columns
    for heading in ("model", "replica", "state", "memory", "running", "queued", "KV", "restarts"):
        made.add_column(heading, no_wrap=True)
    for model in found.models:
        name = f"{model.name} {model.ready_replicas}/{model.wanted_replicas}"
        for replica in model.replicas:
            load = replica.load
            used = 1 - load.blocks_free / load.blocks_total if load.blocks_total else 0.0
            made.add_row(
                name,
                replica.replica_id,
                word(flm_pb2.ReplicaState.DESCRIPTOR, replica.state),
                format_bytes(sum(rank.resident_bytes for rank in replica.ranks)),
                str(load.running),
                str(load.waiting),
                f"{used:.0%}",
                str(replica.restarts),
            )
        if not model.replicas:
            made.add_row(name)
    return made


def why_not_ready(replica: flm_pb2.ReplicaStatus) -> str:
    """What is wrong with a replica; of one that serves again, what was."""
    from flm.proto import flm_pb2

    if replica.message and replica.state == flm_pb2.REPLICA_STATE_READY:
        return f"started again after: {replica.message}"
    return replica.message


def hottest_expert(replica: flm_pb2.ReplicaStatus) -> str:
    """The expert that took the most above its share of its layer's tokens; empty before any token and without experts."""
    shares = [
        (max(layer.tokens) * len(layer.tokens) / sum(layer.tokens), layer)
        for layer in replica.experts
        if any(layer.tokens)
    ]
    if not shares:
        return ""
    share, layer = max(shares, key=lambda pair: pair[0])
    expert = list(layer.tokens).index(max(layer.tokens))
    return (
        f"the hottest expert is {expert} of layer {layer.layer}, with {share:.1f} times its share of tokens"
    )


def duration(seconds: float) -> str:
    """ "2 h 5 min", "3 min 20 s" or "12 s"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
