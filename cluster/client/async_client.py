"""The Python client of a gateway for asyncio; `flm.cluster.client` has the blocking one and an example."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from flm.cluster.client.calls import Asked, Calls
from flm.cluster.client.request import Target
from flm.cluster.wire.grpc_errors import from_rpc_error
from flm.proto import flm_pb2
from flm.worker.errors import NotFound

T = TypeVar("T")


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

    def __init__(self, address: str, *, api_key: str = "", ca_file: str = "", server_name: str = "") -> None:
        super().__init__(grpc.aio, AsyncStream, Target(address, api_key, ca_file, server_name))

    async def tokenize(
        self, text: str, *, model: str = "", add_special_tokens: bool = True, timeout: float | None = None
    ) -> list[int]:
        return await self._answer(self._tokenize(text, model, add_special_tokens), timeout)

    async def detokenize(
        self,
        ids: Sequence[int],
        *,
        model: str = "",
        skip_special_tokens: bool = True,
        timeout: float | None = None,
    ) -> str:
        return await self._answer(self._detokenize(ids, model, skip_special_tokens), timeout)

    async def models(self, *, timeout: float | None = None) -> list[flm_pb2.ModelInfo]:
        """All models that the gateway serves, ready or not."""
        return await self._answer(self._models(), timeout)

    async def model_info(self, model: str = "", *, timeout: float | None = None) -> flm_pb2.ModelInfo:
        return await self._answer(self._model_info(model), timeout)

    async def ready(self, model: str = "", *, timeout: float | None = 5.0) -> bool:
        """Whether a replica of the model is ready; without a model, whether the gateway lives at all."""
        try:
            return await self._answer(self._ready(model), timeout)
        except NotFound:
            return False

    async def close(self) -> None:
        """Ends all streams that are open."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _answer(self, asked: Asked[T], timeout: float | None) -> T:
        try:
            return asked.read(await asked.method(asked.request, timeout=timeout, metadata=self._metadata))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
