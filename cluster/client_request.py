"""What both clients share: where to connect, and how plain Python values become requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from flm.proto import flm_pb2
from flm.worker.errors import ConfigError, InvalidRequest

Message = Mapping[str, str]  # {"role": "user", "content": "…"}


@dataclass(frozen=True)
class Endpoint:
    """A gateway. `api_key`: where it asks for one. `ca_file`: PEM of the authority to trust; makes the connection
    TLS."""

    address: str  # host:port
    api_key: str = ""
    ca_file: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None: no TLS. ConfigError where the file cannot be read."""
        if not self.ca_file:
            return None
        try:
            return grpc.ssl_channel_credentials(Path(self.ca_file).read_bytes())
        except OSError as error:
            raise ConfigError(f"expected a readable PEM file: {error}", field="ca_file") from None


@dataclass(frozen=True)
class Sampling:
    """How to generate. None leaves the choice to the gateway; flm.proto says what it chooses."""

    max_tokens: int | None = None
    temperature: float | None = None  # 0 is greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None
    n: int | None = None
    echo: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None

    def to_proto(self) -> flm_pb2.SamplingOptions:
        """InvalidRequest where a value does not fit its field at all; ranges are the gateway's to check."""
        options = flm_pb2.SamplingOptions()
        for name, value in vars(self).items():
            if value is None:
                continue
            try:
                if name == "stop":
                    options.stop.extend(text.encode() for text in self.stop)
                elif name == "stop_token_ids":
                    options.stop_token_ids.extend(self.stop_token_ids)
                else:
                    setattr(options, name, value)
            except (TypeError, ValueError) as error:
                raise InvalidRequest(f"sampling.{name}", str(error)) from None
        return options


def generate_request(
    prompt: str | Sequence[int], sampling: Sampling | None, model: str
) -> flm_pb2.GenerateRequest:
    request = flm_pb2.GenerateRequest(model=model, sampling=(sampling or Sampling()).to_proto())
    try:
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.prompt_ids.ids.extend(prompt)
    except (TypeError, ValueError) as error:
        raise InvalidRequest("prompt", str(error)) from None
    return request


def chat_request(
    messages: str | Sequence[Message], sampling: Sampling | None, model: str
) -> flm_pb2.ChatRequest:
    request = flm_pb2.ChatRequest(model=model, sampling=(sampling or Sampling()).to_proto())
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    for index, message in enumerate(messages):
        try:
            request.messages.add(role=message["role"], content=message["content"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"messages[{index}]", f"expected role and content as strings: {error!r}"
            ) from None
    return request
