"""What both clients do alike: connect to a gateway, and begin the calls that stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from grpc_health.v1 import health_pb2_grpc

from flm.cluster.client.request import Message, Sampling, Target, chat_request, generate_request
from flm.cluster.wire.listen import CHANNEL_OPTIONS
from flm.proto import flm_pb2_grpc

S = TypeVar("S")


class Calls(Generic[S]):
    """A channel to `target`, made by `library` (grpc or grpc.aio). `stream` makes a client's stream of a call."""

    def __init__(self, library: Any, stream: Callable[[Any], S], target: Target) -> None:
        credentials = target.credentials()
        if credentials is None:
            self._channel = library.insecure_channel(target.address, CHANNEL_OPTIONS)
        else:
            self._channel = library.secure_channel(target.address, credentials, CHANNEL_OPTIONS)
        self._metadata = target.metadata
        self._stub = flm_pb2_grpc.InferenceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._stream = stream

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        model: str = "",
        adapter: str = "",
        timeout: float | None = None,
    ) -> S:
        """Continue a prompt, given as text or as token ids. `adapter`: one of the model's LoRA adapters."""
        request = generate_request(prompt, sampling, model, adapter)
        return self._stream(self._stub.Generate(request, timeout=timeout, metadata=self._metadata))

    def chat(
        self,
        messages: str | Sequence[Message],
        sampling: Sampling | None = None,
        *,
        model: str = "",
        adapter: str = "",
        timeout: float | None = None,
    ) -> S:
        """Answer a conversation; a string is one message of the user. `adapter`: one of the model's LoRA adapters."""
        request = chat_request(messages, sampling, model, adapter)
        return self._stream(self._stub.Chat(request, timeout=timeout, metadata=self._metadata))
