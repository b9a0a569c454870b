"""What a client asks for, checked before anything is queued: every refusal names the field as the proto does."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from flm.proto import flm_pb2
from flm.worker.errors import InvalidRequest
from flm.worker.request import SamplingParams

DEFAULT_MAX_TOKENS = 1024
MAX_N = 16
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024  # bytes
MAX_STOP_IDS = 256  # each token of the stream is looked up among them
MAX_NAME_LENGTH = 256  # characters of request_id and cache_salt
ROLES = ("system", "user", "assistant")

# Fields that go into SamplingParams as they are.
_PLAIN = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
    "logprobs",
)
_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Options:
    """SamplingOptions with every default filled in."""

    request_id: str
    params: SamplingParams  # of index 0
    stops: tuple[str, ...] = ()
    n: int = 1
    echo: bool = False
    priority: int = 0
    cache_salt: str = ""

    def params_of(self, index: int) -> SamplingParams:
        """Each of the n streams draws from a seed of its own; the first has the client's."""
        return replace(self.params, seed=derive_seed(self.params.seed, index)) if index else self.params


def admit(
    options: flm_pb2.SamplingOptions,
    num_prompt: int,
    max_context: int,
    defaults: Mapping[str, float] = MappingProxyType({}),
    vocab_size: int = 2**31 - 1,
) -> Options:
    """Check everything of a request whose prompt has `num_prompt` tokens, for a model with a context of
    `max_context` tokens and its own `defaults` of sampling fields. InvalidRequest names the first wrong field."""
    check_prompt_length(num_prompt, max_context)
    n = options.n if options.HasField("n") else 1
    if not 1 <= n <= MAX_N:
        raise InvalidRequest("sampling.n", f"expected 1 to {MAX_N}, got {n}")
    stops = _stops(options.stop)
    return Options(
        request_id=_name(options, "request_id") or secrets.token_hex(8),
        params=_params(options, max_context - num_prompt, defaults, vocab_size),
        stops=stops,
        n=n,
        echo=options.echo,
        priority=options.priority,
        cache_salt=_name(options, "cache_salt"),
    )


def check_prompt_length(num_prompt: int, max_context: int) -> None:
    """Refuse a prompt without tokens, and one that leaves no room for output."""
    if num_prompt < 1:
        raise InvalidRequest("prompt", "expected at least one token, got none")
    if num_prompt >= max_context:
        raise InvalidRequest(
            "prompt", f"{num_prompt} tokens leave no room for output in a context of {max_context} tokens"
        )


def _params(
    options: flm_pb2.SamplingOptions, room: int, defaults: Mapping[str, float], vocab_size: int
) -> SamplingParams:
    given = {name: getattr(options, name) for name in _PLAIN if options.HasField(name)}
    if len(options.stop_token_ids) > MAX_STOP_IDS:
        raise InvalidRequest(
            "sampling.stop_token_ids",
            f"expected at most {MAX_STOP_IDS} token ids, got {len(options.stop_token_ids)}",
        )
    if options.logprobs > vocab_size:
        raise InvalidRequest(
            "sampling.logprobs", f"expected 0 to {vocab_size}, as the vocabulary has, got {options.logprobs}"
        )
    try:
        return SamplingParams(
            max_tokens=options.max_tokens
            if options.HasField("max_tokens")
            else min(DEFAULT_MAX_TOKENS, room),
            seed=options.seed if options.HasField("seed") else secrets.randbits(64),
            stop_token_ids=tuple(options.stop_token_ids),
            **{**defaults, **given},
        )
    except InvalidRequest as error:
        raise InvalidRequest(f"sampling.{error.field}", error.message) from None


def _stops(raw: Sequence[bytes]) -> tuple[str, ...]:
    if len(raw) > MAX_STOPS:
        raise InvalidRequest("sampling.stop", f"expected at most {MAX_STOPS} stop strings, got {len(raw)}")
    stops = []
    for index, data in enumerate(raw):
        field = f"sampling.stop[{index}]"
        if not 1 <= len(data) <= MAX_STOP_LENGTH:
            raise InvalidRequest(field, f"expected 1 to {MAX_STOP_LENGTH} bytes, got {len(data)}")
        try:
            stops.append(data.decode())
        except UnicodeDecodeError as error:
            raise InvalidRequest(field, f"expected UTF-8: {error.reason} at byte {error.start}") from None
    return tuple(dict.fromkeys(stops))


def _name(options: flm_pb2.SamplingOptions, field: str) -> str:
    value: str = getattr(options, field)
    if len(value) > MAX_NAME_LENGTH:
        raise InvalidRequest(
            f"sampling.{field}", f"expected at most {MAX_NAME_LENGTH} characters, got {len(value)}"
        )
    return value


def check_messages(messages: Sequence[flm_pb2.Message], max_context: int) -> list[dict[str, str]]:
    """Messages as chat templates take them; each is a token of the context at least."""
    if not 1 <= len(messages) < max_context:
        raise InvalidRequest(
            "messages",
            f"expected 1 to {max_context - 1} messages for a context of {max_context} tokens, got {len(messages)}",
        )
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequest(
                f"messages[{index}].role", f"expected one of {', '.join(ROLES)}, got {message.role!r}"
            )
    return [{"role": message.role, "content": message.content} for message in messages]


def check_ids(ids: Sequence[int], vocab_size: int, field: str) -> None:
    """Refuse token ids that the model does not have."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise InvalidRequest(field, f"expected token ids from 0 to {vocab_size - 1}, got {wrong}")


def derive_seed(seed: int, index: int) -> int:
    """The seed of stream `index`: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) over the seed
    advanced by `index` of its gammas."""
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
