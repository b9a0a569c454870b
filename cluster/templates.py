"""Chat templates: the Jinja programs that checkpoints bring along, run where they can do no harm.

They see the messages and a few functions that the field agreed on, nothing else; the text they may make and the
time they may take are bounded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flm.worker.errors import InvalidRequest

# For checkpoints that bring no template: ChatML, as OpenAI published it.
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_CHARACTERS = 4 << 20
MAX_SECONDS = 1.0


class _Exceeded(Exception):
    """A template made too much text or took too long."""


class _Refused(Exception):
    """A template called raise_exception()."""


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Also checks the clock wherever a template does something, and refuses to build huge strings."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.deadline = float("inf")
        self.filters["tojson"] = _tojson
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: datetime.now().strftime(pattern),
            "range": self._range,
        }

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise _Exceeded(f"it took more than {MAX_SECONDS:g} s")

    def _range(self, *bounds: int) -> Iterator[int]:
        for value in range(*bounds):
            self.tick()
            yield value

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.tick()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.tick()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "*" and not _small_product(left, right)):
            raise _Exceeded(f"{type(left).__name__} {operator} {type(right).__name__} may become too large")
        return super().call_binop(context, operator, left, right)


def _small_product(left: Any, right: Any) -> bool:
    sizes = [value if isinstance(value, int | float) else len(value) for value in (left, right)]
    return abs(sizes[0] * sizes[1]) <= MAX_CHARACTERS


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Plain JSON; Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


class ChatTemplate:
    """One model's template. `source` None: ChatML. Not for use from several threads at once."""

    def __init__(self, source: str | None, bos_token: str = "", eos_token: str = "") -> None:
        self._environment = _BoundedEnvironment()
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._problem = ""
        try:
            self._template = self._environment.from_string(CHATML if source is None else source)
        except jinja2.TemplateError as error:
            # The model can still serve Generate; Chat says why it cannot.
            self._problem = f"this model's chat template is broken: {error}"

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that asks for the next assistant message. `messages`: role and content each. InvalidRequest
        where the template refuses them or fails."""
        if self._problem:
            raise InvalidRequest("messages", self._problem)
        self._environment.deadline = time.monotonic() + MAX_SECONDS
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=list(messages), add_generation_prompt=True, **self._tokens
            ):
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise _Exceeded(f"it made more than {MAX_CHARACTERS} characters")
                self._environment.tick()
                pieces.append(piece)
        except _Refused as error:
            raise InvalidRequest("messages", f"the chat template refuses them: {error}") from None
        except _Exceeded as error:
            raise InvalidRequest("messages", f"the chat template was stopped: {error}") from None
        except (
            jinja2.TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:
            raise InvalidRequest("messages", f"the chat template failed on them: {error}") from None
        return "".join(pieces)
