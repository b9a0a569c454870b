"""What both clients do alike: connect to a gateway, begin the calls that stream, and say of the others what is asked
and what the answer means. How to wait for an answer is each client's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from grpc_health.v1 import health_pb2, health_pb2_grpc

from flm.cluster.client.request import (
    Message,
    Sampling,
    Target,
    chat_request,
    checked_name,
    generate_request,
    of_field,
)
from flm.proto import flm_pb2, flm_pb2_grpc

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Asked(Generic[T]):
    """A call with one answer: `method` of a stub, its request, and how to read what comes back."""

    method: Callable[..., Any]
    request: Any
    read: Callable[[Any], T]


class Calls(Generic[S]):
    """A channel to `target`, made by `library` (grpc or grpc.aio). `stream` makes a client's stream of a call."""

    def __init__(self, library: Any, stream: Callable[[Any], S], target: Target) -> None:
        credentials = target.credentials()
        if credentials is None:
            self._channel = library.insecure_channel(target.address, target.options)
        else:
            self._channel = library.secure_channel(target.address, credentials, target.options)
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

    def _tokenize(self, text: str, model: str, add_special_tokens: bool) -> Asked[list[int]]:
        request = flm_pb2.TokenizeRequest(model=checked_name(model), add_special_tokens=add_special_tokens)
        with of_field("text"):
            request.text = text
        return Asked(self._stub.Tokenize, request, lambda answer: list(answer.ids))

    def _detokenize(self, ids: Sequence[int], model: str, skip_special_tokens: bool) -> Asked[str]:
        request = flm_pb2.DetokenizeRequest(
            model=checked_name(model), skip_special_tokens=skip_special_tokens
        )
        with of_field("ids"):
            request.ids.extend(ids)
        return Asked(self._stub.Detokenize, request, lambda answer: str(answer.text))

    def _models(self) -> Asked[list[flm_pb2.ModelInfo]]:
        return Asked(self._stub.ListModels, flm_pb2.ListModelsRequest(), lambda answer: list(answer.models))

    def _model_info(self, model: str) -> Asked[flm_pb2.ModelInfo]:
        request = flm_pb2.GetModelInfoRequest(model=checked_name(model))
        return Asked(self._stub.GetModelInfo, request, lambda answer: answer)

    def _ready(self, model: str) -> Asked[bool]:
        serving = health_pb2.HealthCheckResponse.SERVING
        request = health_pb2.HealthCheckRequest(service=checked_name(model))
        return Asked(self._health.Check, request, lambda answer: bool(answer.status == serving))
