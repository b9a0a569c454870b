"""How commands reach a gateway, and what they send: shared options, one open connection, one request's sampling."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from flm.proto import flm_pb2

Model = Annotated[
    str, typer.Option("--model", "-m", help="The served model; may be left out where there is only one.")
]
Address = Annotated[str, typer.Option("--address", help="host:port of a gateway, for a cluster elsewhere.")]
ApiKey = Annotated[str, typer.Option(envvar="FLM_API_KEY", help="Key of that gateway.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of the answer.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus sampling.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Stats = Annotated[bool, typer.Option("--stats", help="Then print token counts and speed to stderr.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@dataclass(frozen=True)
class Target:
    """A gateway's address and what it wants to see. `ca_file`: PEM of its certificate, "" without TLS."""

    address: str
    key: str = ""
    ca_file: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.key}"),) if self.key else ()

    def credentials(self) -> Any:
        """grpc.ChannelCredentials, or None for a plain channel."""
        import grpc

        return grpc.ssl_channel_credentials(Path(self.ca_file).read_bytes()) if self.ca_file else None


def find_target(cluster: str, address: str, api_key: str) -> Target:
    """The gateway at an address, or that of a cluster running here. NotFound, InvalidRequest where there is none."""
    if address:
        return Target(address, api_key)
    from flm.cluster.state import find_endpoint

    endpoint = find_endpoint(cluster)
    return Target(endpoint.gateway, api_key or endpoint.gateway_key, endpoint.ca_file)


@contextmanager
def open_stub(target: Target) -> Iterator[Any]:
    """An InferenceStub. What a call raises inside becomes the FlmError that the gateway meant."""
    import grpc

    from flm.cluster.grpc_errors import from_rpc_error
    from flm.cluster.listen import CHANNEL_OPTIONS
    from flm.proto import flm_pb2_grpc

    secure = target.credentials()
    if secure:
        channel = grpc.secure_channel(target.address, secure, CHANNEL_OPTIONS)
    else:
        channel = grpc.insecure_channel(target.address, CHANNEL_OPTIONS)
    with channel:
        try:
            yield flm_pb2_grpc.InferenceStub(channel)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None


def sampling(
    max_tokens: int | None, temperature: float | None, top_p: float | None, seed: int | None, stop: list[str]
) -> flm_pb2.SamplingOptions:
    """Only what was asked for: absent fields are the gateway's to choose."""
    from flm.proto import flm_pb2
    from flm.worker.errors import InvalidRequest

    try:  # None leaves a field absent
        return flm_pb2.SamplingOptions(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=[text.encode() for text in stop],
        )
    except ValueError as error:  # outside of the field's range: protobuf says which
        raise InvalidRequest("sampling", str(error)) from None


def text_argument(text: str) -> str:
    """The text, or all of standard input for "-"."""
    return sys.stdin.read() if text == "-" else text
