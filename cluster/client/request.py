"""What both clients share: where to connect, and how plain Python values become requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from flm.cluster.wire.listen import CHANNEL_OPTIONS, bearer
from flm.proto import flm_pb2
from flm.worker.errors import ConfigError, InvalidRequest

Message = Mapping[str, str]  # {"role": "user", "content": "…"}


@contextmanager
def of_field(name: str, expected: str = "") -> Iterator[None]:
    """What a value that does not fit into its message raises becomes InvalidRequest with its field."""
    try:
        yield
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InvalidRequest(name, f"{expected}: {error!r}" if expected else str(error)) from None


@dataclass(frozen=True)
class Target:
    """A gateway. `api_key`: where it asks for one. `ca_file`: PEM of the authority to trust; makes the connection
    TLS. `server_name`: that its certificate is for, where it is reached by another."""

    address: str  # host:port
    api_key: str = ""
    ca_file: str = ""
    server_name: str = ""

    def __post_init__(self) -> None:
        if not self.address.isprintable() or not self.address:
            raise ConfigError(f"expected host:port, got {self.address!r}", field="address")
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("expected printable ASCII", field="api_key")  # it is a header's value

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return bearer(self.api_key)

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """Of the channel."""
        named = (("grpc.ssl_target_name_override", self.server_name),) if self.server_name else ()
        return (*CHANNEL_OPTIONS, *named)

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
            with of_field(f"sampling.{name}"):
                if name == "stop":
                    options.stop.extend(text.encode() for text in self.stop)
                elif name == "stop_token_ids":
                    options.stop_token_ids.extend(self.stop_token_ids)
                else:
                    setattr(options, name, value)
        return options


def checked_name(name: str, field: str = "model") -> str:
    """A name that every message takes."""
    with of_field(field):
        return str(flm_pb2.GetModelInfoRequest(model=name).model)


def generate_request(
    prompt: str | Sequence[int], sampling: Sampling | None, model: str, adapter: str
) -> flm_pb2.GenerateRequest:
    options, name = (sampling or Sampling()).to_proto(), checked_name(adapter, "adapter")
    request = flm_pb2.GenerateRequest(model=checked_name(model), adapter=name, sampling=options)
    with of_field("prompt"):
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.prompt_ids.ids.extend(prompt)
    return request


def chat_request(
    messages: str | Sequence[Message], sampling: Sampling | None, model: str, adapter: str
) -> flm_pb2.ChatRequest:
    options, name = (sampling or Sampling()).to_proto(), checked_name(adapter, "adapter")
    request = flm_pb2.ChatRequest(model=checked_name(model), adapter=name, sampling=options)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    with of_field("messages", "expected a sequence"):
        messages = list(messages)
    for index, message in enumerate(messages):
        with of_field(f"messages[{index}]", "expected role and content as strings"):
            request.messages.add(role=message["role"], content=message["content"])
    return request
