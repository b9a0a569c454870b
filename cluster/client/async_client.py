"""The Python client of a gateway for asyncio; `flm.cluster.client` has the blocking one and an example."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from flm.cluster.client.calls import Calls
from flm.cluster.client.request import (
    Target,
    detokenize_request,
    health_request,
    model_info_request,
    tokenize_request,
)
from flm.cluster.wire.grpc_errors import from_rpc_error
from flm.proto import flm_pb2
from flm.worker.errors import NotFound


class AsyncStream(AsyncIterator[flm_pb2.GenerateFrame]):
    """Frames of one call, as they come. Leaving an `async with` block or calling cancel() ends the work behind
    it."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._frames = aiter(call)

    async def __anext__(self) -> flm_pb2.GenerateFrame:
        try:
            frame: flm_pb2.GenerateFrame = await anext(self._frames)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return frame

    async def texts(self) -> AsyncIterator[str]:
        """Only the text; of all indices as they come, where n > 1."""
        async for frame in self:
            if frame.text:
                yield frame.text

    def cancel(self) -> None:
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncClient(Calls[AsyncStream]):
    """Belongs to the event loop that made it. `timeout`s are seconds for the whole call, None: no limit.
    `model` may be left out where a gateway serves only one."""

    def __init__(self, address: str, *, api_key: str = "", ca_file: str = "") -> None:
        super().__init__(grpc.aio, AsyncStream, Target(address, api_key, ca_file))

    async def tokenize(
        self, text: str, *, model: str = "", add_special_tokens: bool = True, timeout: float | None = None
    ) -> list[int]:
        request = tokenize_request(text, model, add_special_tokens)
        return list((await self._call(self._stub.Tokenize, request, timeout)).ids)

    async def detokenize(
        self,
        ids: Sequence[int],
        *,
        model: str = "",
        skip_special_tokens: bool = True,
        timeout: float | None = None,
    ) -> str:
        request = detokenize_request(ids, model, skip_special_tokens)
        return str((await self._call(self._stub.Detokenize, request, timeout)).text)

    async def models(self, *, timeout: float | None = None) -> list[flm_pb2.ModelInfo]:
        """All models that the gateway serves, ready or not."""
        return list((await self._call(self._stub.ListModels, flm_pb2.ListModelsRequest(), timeout)).models)

    async def model_info(self, model: str = "", *, timeout: float | None = None) -> flm_pb2.ModelInfo:
        request = model_info_request(model)
        info: flm_pb2.ModelInfo = await self._call(self._stub.GetModelInfo, request, timeout)
        return info

    async def ready(self, model: str = "", *, timeout: float | None = 5.0) -> bool:
        """Whether a replica of the model is ready; without a model, whether the gateway lives at all."""
        try:
            answer = await self._call(self._health.Check, health_request(model), timeout)
        except NotFound:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Ends all streams that are open."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: Callable[..., Any], request: Any, timeout: float | None) -> Any:
        try:
            return await method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
