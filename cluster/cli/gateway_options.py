"""Which gateway a command talks to and how it samples: options and their meaning, the same for all commands."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from flm.cluster.cli.options import running_cluster

if TYPE_CHECKING:
    from flm.cluster.client import Client
    from flm.cluster.client.request import Target

Model = Annotated[
    str, typer.Option("--model", "-m", help="The served model; may be left out where there is only one.")
]
Adapter = Annotated[str, typer.Option(help="One of the model's LoRA adapters.")]
Address = Annotated[str, typer.Option("--address", help="host:port of a gateway, for a cluster elsewhere.")]
ApiKey = Annotated[str, typer.Option(envvar="FLM_API_KEY", help="Key of that gateway.")]
CaFile = Annotated[str, typer.Option(help="PEM of the authority to trust, where that gateway speaks TLS.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of the answer.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus sampling.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Stats = Annotated[bool, typer.Option("--stats", help="Then print token counts and speed to stderr.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def gateway_target(cluster: str, address: str, api_key: str, ca_file: str) -> Target:
    """The gateway at an address, or that of a cluster running here. NotFound, InvalidRequest where there is none."""
    from flm.cluster.client.request import Target

    if address:
        return Target(address, api_key, ca_file)
    found = running_cluster(cluster)
    if ca_file:  # another authority, whose word is for the address
        return Target(found.gateway, api_key or found.gateway_key, ca_file)
    return Target(found.gateway, api_key or found.gateway_key, found.ca_file, found.server_name)


def gateway_client(target: Target) -> Client:
    from flm.cluster.client import Client

    return Client(**vars(target))


def say_if_none_is_ready(client: Client, model: str) -> None:
    """On standard error, why a request may have to wait. Raises what the gateway has against the model."""
    info = client.model_info(model)
    if info.wanted_replicas and not info.ready_replicas:
        print(f"0 of {info.wanted_replicas} replicas of {info.name} are ready", file=sys.stderr)


def text_argument(text: str) -> str:
    """The text, or all of standard input for "-"."""
    return sys.stdin.read() if text == "-" else text
