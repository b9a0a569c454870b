"""`flm-cluster events`: what happened, and what happens."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from flm.cluster.cli.options import AdminOption, ClusterOption, KeyOption, admin_client

if TYPE_CHECKING:
    from flm.proto import flm_pb2


def events(
    cluster: ClusterOption = "",
    address: AdminOption = "",
    api_key: KeyOption = "",
    new_only: Annotated[bool, typer.Option("--new", help="Leave out what happened before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Print the cluster's events as they come, until Ctrl-C."""
    from google.protobuf.json_format import MessageToJson

    with admin_client(cluster, address, api_key) as client:
        try:
            for event in client.events(replay=not new_only):
                line = (
                    MessageToJson(event, indent=None, preserving_proto_field_name=True)
                    if as_json
                    else describe(event)
                )
                print(line, flush=True)
        except KeyboardInterrupt:
            return


def describe(event: flm_pb2.Event) -> str:
    """ "14:03:07 replica_ready smollm2-0: at 127.0.0.1:40001"."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    subject = event.replica_id or event.model
    return (
        f"{clock} {event.kind}"
        + (f" {subject}" if subject else "")
        + (f": {event.message}" if event.message else "")
    )
