"""The public front of a cluster: flm.v1.Inference, grpc.health.v1 and reflection on one port.

A Gateway lives in one asyncio event loop. The controller pushes routes into it; nothing else is asked of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from flm.cluster.gateway.inference import Inference
from flm.cluster.gateway.router import ReplicaRoute
from flm.cluster.gateway.served_model import LoadedModel, ServedModel, Words, read_words
from flm.cluster.wire.certificate import Tls
from flm.cluster.wire.listen import bind_within, create_server
from flm.proto import flm_pb2, flm_pb2_grpc
from flm.worker.errors import ConfigError, ModelNotFound
from flm.worker.vocabularies.files import load_tokenizer
from flm.worker.vocabularies.tokenizer import Tokenizer

__all__ = ["Gateway", "ReplicaRoute", "ServedModel", "Tls"]

log = logging.getLogger(__name__)

SERVICES = (
    flm_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
    health.SERVICE_NAME,
    reflection.SERVICE_NAME,
)


class Gateway:
    """One gateway. All methods belong to the event loop that called start()."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        listen: str,
        *,
        replica_key: str = "",
        api_keys: Sequence[str] = (),
        tls: Tls | None = None,
        replica_wait: float = 30.0,
        load: Callable[[Path], Tokenizer] = load_tokenizer,
    ) -> None:
        """`listen` is host:port (port 0 takes a free one). `replica_wait`: seconds that a request without a
        deadline waits for a ready replica, 0: none waits. `replica_key`: what replicas ask for; they refuse a gateway without it.
        `load` reads the tokenizer that lies with a model."""
        names = [model.name for model in models]
        if len(set(names)) < len(names):
            raise ConfigError(f"expected different names, got {', '.join(names)}", field="models.name")
        self._specs = tuple(models)
        self._listen, self._tls, self._api_keys = listen, tls, tuple(api_keys)
        self._replica_key = replica_key
        self._load = load
        self._models: dict[str, LoadedModel] = {}
        self._inference = Inference(self._models, replica_wait)
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._publishing: set[asyncio.Task[None]] = set()

    async def start(self, patience: float = 0.0) -> str:
        """Bind (for `patience` seconds, while the port is taken), load tokenizers and serve; the bound host:port.
        ConfigError where the address cannot be bound, CheckpointError and ConfigError of read_words: nothing is left
        running then."""
        server = create_server(self._api_keys)
        address = await bind_within(patience, server, self._listen, self._tls)
        try:
            for spec in self._specs:
                await self._add(spec)
        except BaseException:
            await server.start()  # a server that never started does not let go of its port
            await server.stop(None)
            raise
        flm_pb2_grpc.add_InferenceServicer_to_server(self._inference, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(SERVICES, server)
        await server.start()
        self._server = server
        log.info("gateway listens on %s", address)
        return address

    async def _add(self, spec: ServedModel) -> None:
        words = await asyncio.to_thread(self._read, spec)
        self._models[spec.name] = LoadedModel(
            spec, words, partial(self._publish, spec.name), self._replica_key
        )
        await self._health.set(spec.name, health_pb2.HealthCheckResponse.NOT_SERVING)

    def _read(self, spec: ServedModel) -> Words:
        words = read_words(spec, self._load)
        words.tokenizer.warm()  # else the first request would hold up the event loop
        return words

    async def stop(self, grace: float = 5.0) -> None:
        """Refuse new calls, give running ones `grace` seconds, then end them."""
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(grace)
        for model in self._models.values():
            await model.close()
        await asyncio.gather(*self._publishing)

    def set_routes(self, model: str, routes: Sequence[ReplicaRoute], wanted: int | None = None) -> None:
        """The controller's view of one model: all of its replicas, and how many there should be (by default as
        many as there are). ModelNotFound where this gateway does not serve it."""
        loaded = self._models.get(model)
        if loaded is None:
            raise ModelNotFound(model, list(self._models))
        loaded.replicas.update(routes, len(routes) if wanted is None else wanted)

    def _publish(self, name: str) -> None:
        task = asyncio.get_running_loop().create_task(self._publish_health(name))
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _publish_health(self, name: str) -> None:
        """A model is ready iff one of its replicas is."""
        serving = health_pb2.HealthCheckResponse.SERVING
        ready = self._models[name].ready > 0
        await self._health.set(name, serving if ready else health_pb2.HealthCheckResponse.NOT_SERVING)
