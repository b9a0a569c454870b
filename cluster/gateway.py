"""The public front of a cluster: flm.v1.Inference, grpc.health.v1 and reflection on one port.

A Gateway lives in one asyncio event loop. The controller pushes routes into it; nothing else is asked of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flm.cluster.router import ReplicaRoute

__all__ = ["Gateway", "ReplicaRoute", "ServedModel", "Tls"]


@dataclass(frozen=True)
class ServedModel:
    """What the gateway has to know of a model, whether a replica of it is up or not."""

    name: str
    path: str  # a directory, a .gguf file or package:<distribution>: where its tokenizer is
    max_context: int  # tokens, prompt and output together
    architecture: str = ""
    quantization: str = "auto"
    tensor_parallel: int = 1


@dataclass(frozen=True)
class Tls:
    """Paths of PEM files."""

    cert_file: str
    key_file: str


class Gateway:
    """One gateway. All methods belong to the event loop that called start()."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        listen: str,
        *,
        api_keys: Sequence[str] = (),
        tls: Tls | None = None,
        replica_wait: float = 30.0,
    ) -> None:
        """`listen` is host:port (port 0 takes a free one). `replica_wait`: seconds that a request without a
        deadline waits for a ready replica."""

    async def start(self) -> str:
        """Load tokenizers, bind and serve; the bound host:port. ConfigError where the address cannot be
        bound, CheckpointError where a tokenizer cannot be read: nothing is left running then."""
        raise NotImplementedError

    async def stop(self, grace: float = 5.0) -> None:
        """Refuse new calls, give running ones `grace` seconds, then end them."""

    def set_routes(self, model: str, routes: Sequence[ReplicaRoute], wanted: int | None = None) -> None:
        """The controller's view of one model: all of its replicas, and how many there should be."""
