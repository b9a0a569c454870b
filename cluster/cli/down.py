"""`flm-cluster down`: drain, then end every process of the cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from flm.cluster.cli.options import ClusterOption


def down(
    cluster: ClusterOption = "",
    timeout: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds for running streams; default: each model's drain_timeout."),
    ] = None,
) -> None:
    """Drain the cluster's replicas and stop everything that `up` started."""
    from flm.cluster.launch.ending import drain_cluster, end_cluster, why_gone
    from flm.cluster.state import find_endpoint
    from flm.worker.errors import FlmError

    endpoint = find_endpoint(cluster)
    gone = why_gone(endpoint)
    if gone:
        end_cluster(endpoint)
        print(f"{endpoint.name} had ended before: {gone}")
        return
    try:
        drain_cluster(endpoint, timeout)
    except FlmError as error:
        print(f"not drained: {error}")
    end_cluster(endpoint)
    print(f"{endpoint.name} is stopped")
