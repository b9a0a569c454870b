"""The client for programs that wait for each answer; see flm.cluster.client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from flm.cluster.client.calls import Asked, Calls
from flm.cluster.client.request import Target
from flm.cluster.wire.grpc_errors import from_rpc_error
from flm.proto import flm_pb2
from flm.worker.errors import NotFound

T = TypeVar("T")


class Stream(Iterator[flm_pb2.GenerateFrame]):
    """Frames of one call, as they come. Leaving a `with` block or calling cancel() ends the work behind it."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __next__(self) -> flm_pb2.GenerateFrame:
        try:
            frame: flm_pb2.GenerateFrame = next(self._call)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return frame

    def texts(self) -> Iterator[str]:
        """Only the text; of all indices as they come, where n > 1."""
        return (frame.text for frame in self if frame.text)

    def cancel(self) -> None:
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class Client(Calls[Stream]):
    """Blocking calls; safe to share between threads. `timeout`s are seconds for the whole call, None: no limit.
    `model` may be left out where a gateway serves only one."""

    def __init__(self, address: str, *, api_key: str = "", ca_file: str = "", server_name: str = "") -> None:
        super().__init__(grpc, Stream, Target(address, api_key, ca_file, server_name))

    def tokenize(
        self, text: str, *, model: str = "", add_special_tokens: bool = True, timeout: float | None = None
    ) -> list[int]:
        return self._answer(self._tokenize(text, model, add_special_tokens), timeout)

    def detokenize(
        self,
        ids: Sequence[int],
        *,
        model: str = "",
        skip_special_tokens: bool = True,
        timeout: float | None = None,
    ) -> str:
        return self._answer(self._detokenize(ids, model, skip_special_tokens), timeout)

    def models(self, *, timeout: float | None = None) -> list[flm_pb2.ModelInfo]:
        """All models that the gateway serves, ready or not."""
        return self._answer(self._models(), timeout)

    def model_info(self, model: str = "", *, timeout: float | None = None) -> flm_pb2.ModelInfo:
        return self._answer(self._model_info(model), timeout)

    def ready(self, model: str = "", *, timeout: float | None = 5.0) -> bool:
        """Whether a replica of the model is ready; without a model, whether the gateway lives at all."""
        try:
            return self._answer(self._ready(model), timeout)
        except NotFound:
            return False

    def close(self) -> None:
        """Ends all streams that are open."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, asked: Asked[T], timeout: float | None) -> T:
        try:
            return asked.read(asked.method(asked.request, timeout=timeout, metadata=self._metadata))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
