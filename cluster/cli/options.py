"""Which cluster a command talks to: options and their meaning, the same for all commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from flm.cluster.client.admin_client import AdminClient
    from flm.cluster.state import Endpoint

ClusterOption = Annotated[str, typer.Option("--cluster", help="Name of the cluster, where several run here.")]
AdminOption = Annotated[
    str, typer.Option("--address", help="host:port of the Admin service, for a cluster elsewhere.")
]
KeyOption = Annotated[str, typer.Option("--api-key", envvar="FLM_ADMIN_KEY", help="Key of that service.")]


def running_cluster(name: str) -> Endpoint:
    """The named cluster, or the only one that runs here. NotFound where there is none, Unavailable where nothing is
    left of it but its name."""
    from flm.cluster.launch.ending import why_gone
    from flm.cluster.state import find_endpoint
    from flm.worker.errors import Unavailable

    endpoint = find_endpoint(name)
    if why := why_gone(endpoint):
        raise Unavailable(f"cluster {endpoint.name!r} has ended: {why}; `flm-cluster down` clears it away")
    return endpoint


def admin_client(cluster: str, address: str, api_key: str) -> AdminClient:
    """A client of the addressed Admin service, or of the one whose cluster runs here. NotFound where there is none."""
    from flm.cluster.client.admin_client import AdminClient

    if address:
        return AdminClient(address, api_key)
    endpoint = running_cluster(cluster)
    return AdminClient(endpoint.admin, api_key or endpoint.admin_key)
