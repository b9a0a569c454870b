"""gRPC servers and channels as this project wants them: one port each, taken ports refused, keys checked."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from flm.cluster.wire.certificate import Tls
from flm.cluster.wire.grpc_errors import abort
from flm.worker.errors import ConfigError, Unauthenticated

MAX_MESSAGE = 16 << 20  # bytes
PORT_SECONDS, PORT_PAUSE = 10.0, 0.25  # for the process before this one to let go of its port
_HEALTH = "/grpc.health.v1.Health/"  # probes carry no key

SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # else two programs share a port and each gets some of the calls
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.http2.min_ping_interval_without_data_ms", 2000),  # allow our own channels' keepalive
    ("grpc.http2.max_ping_strikes", 0),
)
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.initial_reconnect_backoff_ms", 50),  # gRPC's own begins at 1 s and grows to 2 min
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 5000),  # a host that is lost without a word is noticed in 10 s
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.enable_http_proxy", 0),
)


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    """Metadata of a call that carries `key`; none without one."""
    return (("authorization", f"Bearer {key}"),) if key else ()


class KeyCheck(grpc.aio.ServerInterceptor):
    """Lets calls pass that carry `authorization: Bearer <one of the keys>`, and health probes."""

    def __init__(self, api_keys: Sequence[str]) -> None:
        self._keys = [f"Bearer {key}".encode() for key in api_keys]

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        if details.method.startswith(_HEALTH) or self._allowed(details.invocation_metadata):
            return await continuation(details)
        return grpc.stream_stream_rpc_method_handler(_refuse)  # of any call, before its first message

    def _allowed(self, metadata: Any) -> bool:
        given = next((value for key, value in metadata if key == "authorization"), "")
        data = given if isinstance(given, bytes) else str(given).encode()
        return any(hmac.compare_digest(data, key) for key in self._keys)


async def _refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
    await abort(
        context, Unauthenticated("expected metadata `authorization: Bearer <api key>` with a known key")
    )


def create_server(api_keys: Sequence[str] = ()) -> grpc.aio.Server:
    """A server without services or ports. No keys: everyone may call.

    Stop it before the tasks of its loop are all cancelled, as asyncio.run does in the end: gRPC (1.85) then frees the
    memory that its core was told to write the next call into, and the core writes there when the server is stopped.
    """
    return grpc.aio.server(interceptors=[KeyCheck(api_keys)] if api_keys else [], options=SERVER_OPTIONS)


def bind(server: grpc.aio.Server, listen: str, tls: Tls | None = None, field: str = "gateway.listen") -> str:
    """Bind `listen` (host:port, port 0 takes a free one) and return the bound host:port. ConfigError, naming
    `field`, where that is no address, or taken."""
    host, separator, port = listen.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"expected host:port, got {listen!r}", field=field)
    try:
        bound = server.add_secure_port(listen, tls.credentials()) if tls else server.add_insecure_port(listen)
    except RuntimeError:
        bound = 0
    if not bound:
        raise ConfigError(
            f"cannot listen on {listen}: expected an address of this machine and a port that no other program "
            "has taken",
            field=field,
        )
    return f"{host}:{bound}"


async def bind_within(
    seconds: float,
    server: grpc.aio.Server,
    listen: str,
    tls: Tls | None = None,
    field: str = "gateway.listen",
) -> str:
    """bind(), tried for some seconds: a process that was started again may find its last life at the port."""
    until = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            return bind(server, listen, tls, field)
        except ConfigError:
            if asyncio.get_running_loop().time() > until:
                raise
            await asyncio.sleep(PORT_PAUSE)
