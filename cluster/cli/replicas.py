"""`flm-cluster scale`, `drain` and `restart`: change how many replicas run, or which."""

from __future__ import annotations

from typing import Annotated

import typer

from flm.cluster.cli.options import AdminOption, ClusterOption, KeyOption, admin_client

ReplicaArgument = Annotated[str, typer.Argument(help="A replica's id, as `status` shows it.")]


def scale(
    model: Annotated[str, typer.Argument(help="A served model's name.")],
    replicas: Annotated[int, typer.Argument(help="How many replicas are wanted.", min=0)],
    cluster: ClusterOption = "",
    address: AdminOption = "",
    api_key: KeyOption = "",
) -> None:
    """Want N replicas of MODEL from now on. Replicas that go finish their streams first."""
    with admin_client(cluster, address, api_key) as client:
        previous = client.scale(model, replicas)
    print(f"{model}: {previous} → {replicas} replicas wanted")


def drain(
    replica: ReplicaArgument, cluster: ClusterOption = "", address: AdminOption = "", api_key: KeyOption = ""
) -> None:
    """Let REPLICA finish its streams and stop it; one replica less is wanted from now on."""
    with admin_client(cluster, address, api_key) as client:
        client.drain(replica)
    print(f"{replica} is draining")


def restart(
    replica: ReplicaArgument, cluster: ClusterOption = "", address: AdminOption = "", api_key: KeyOption = ""
) -> None:
    """Replace REPLICA: it finishes its streams while its successor starts."""
    with admin_client(cluster, address, api_key) as client:
        client.restart(replica)
    print(f"{replica} is being replaced")
