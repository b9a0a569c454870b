"""`flm-cluster events`: what happened, and what happens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from flm.cluster.cli.options import AdminOption, ClusterOption, KeyOption, admin_client

if TYPE_CHECKING:
    from flm.cluster.state import Endpoint
    from flm.proto import flm_pb2

RECONNECT = 1.0  # seconds


def events(
    cluster: ClusterOption = "",
    address: AdminOption = "",
    api_key: KeyOption = "",
    new_only: Annotated[bool, typer.Option("--new", help="Leave out what happened before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Print the cluster's events as they come, until Ctrl-C."""
    from flm.cluster.cli.plain import plain

    with admin_client(cluster, address, api_key) as client:
        try:
            for event in client.events(replay=not new_only):
                print(json.dumps(plain(event)) if as_json else describe(event), flush=True)
        except KeyboardInterrupt:
            return


def follow(
    endpoint: Endpoint, show: Callable[[str], None], pause: Callable[[float], object] = time.sleep
) -> None:
    """Show events for as long as the cluster lives, over all of its controllers; or say why they cannot be shown."""
    from flm.cluster.client.admin_client import AdminClient
    from flm.worker.errors import FlmError, Unavailable

    while True:
        try:
            with AdminClient(endpoint.admin, endpoint.admin_key) as client:
                for event in client.events(replay=False):
                    show(describe(event))
        except Unavailable:
            pass  # the controller is being started again
        except FlmError as error:
            show(f"Events are not shown any more: {error}")
            return
        pause(RECONNECT)


def describe(event: flm_pb2.Event) -> str:
    """ "14:03:07 replica_ready smollm2-0: at 127.0.0.1:40001"."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    subject = event.replica_id or event.model
    return (
        f"{clock} {event.kind}"
        + (f" {subject}" if subject else "")
        + (f": {event.message}" if event.message else "")
    )
