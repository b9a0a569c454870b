"""The gateway's life inside its process: made from the desired state, serving before anyone tells it routes."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence

from flm.cluster.gateway.gateway import Gateway, Tls
from flm.cluster.gateway.router import ReplicaRoute
from flm.cluster.gateway.served_model import served_model
from flm.cluster.settings.config import parse_config
from flm.cluster.state import Desired
from flm.cluster.wire.listen import PORT_SECONDS
from flm.worker.errors import FlmError

log = logging.getLogger(__name__)


class GatewayProcess:
    """Belongs to one event loop."""

    def __init__(self, desired: Desired) -> None:
        config = parse_config(desired.text, desired.file)
        models = [served_model(model, desired.facts[model.name]) for model in config.models]
        self._section, self._models, self._replica_key = config.gateway, models, desired.replica_key
        self._incarnation = uuid.uuid4().hex
        self._gateway: Gateway | None = None
        self._failure = ""
        self._started = asyncio.Event()

    async def run(self) -> None:
        """Serve until stopped; where that fails for good, wait for someone to ask why."""
        try:
            self._gateway = await self._bound()
        except FlmError as error:
            self._failure = str(error)
        except Exception as error:
            log.exception("the gateway cannot start")
            self._failure = f"internal error: {error!r}"
        self._started.set()

    async def _bound(self) -> Gateway:
        section = self._section.tls
        tls = Tls(section.cert_file, section.key_file) if section is not None else None
        gateway = Gateway(
            self._models,
            self._section.listen,
            replica_key=self._replica_key,
            api_keys=self._section.api_keys,
            tls=tls,
            replica_wait=self._section.replica_wait,
        )
        await gateway.start(PORT_SECONDS)
        return gateway

    async def status(self) -> tuple[str, str]:
        """(incarnation, why it cannot serve)."""
        await self._started.wait()
        return self._incarnation, self._failure

    async def set_routes(self, model: str, routes: Sequence[ReplicaRoute], wanted: int) -> None:
        if self._gateway is not None:
            self._gateway.set_routes(model, routes, wanted)

    async def stop(self, grace: float) -> None:
        if self._gateway is not None:
            await self._gateway.stop(grace)
