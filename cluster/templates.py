"""Chat templates: the Jinja programs that checkpoints bring along, run where they can do no harm.

They see the messages and a few functions that the field agreed on, nothing else; the text they may make and the
time they may take are bounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import jinja2

from flm.cluster.template_sandbox import MAX_CHARACTERS, BoundedEnvironment, Exceeded, Refused
from flm.worker.errors import InvalidRequest

# For checkpoints that bring no template: ChatML, as OpenAI published it.
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_FAILURES = (  # of programs, whoever wrote them; RecursionError is a RuntimeError
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """One model's template. `source` None: ChatML. Not for use from several threads at once."""

    def __init__(self, source: str | None, bos_token: str = "", eos_token: str = "") -> None:
        self._environment = BoundedEnvironment()
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._problem = ""
        try:
            self._template = self._environment.from_string(CHATML if source is None else source)
        except _FAILURES as error:
            # The model can still serve Generate; Chat says why it cannot.
            self._problem = f"this model's chat template is broken: {_why(error)}"

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that asks for the next assistant message. `messages`: role and content each. InvalidRequest
        where the template refuses them or fails."""
        if self._problem:
            raise InvalidRequest("messages", self._problem)
        self._environment.begin()
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=list(messages), add_generation_prompt=True, **self._tokens
            ):
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise Exceeded(f"it made more than {MAX_CHARACTERS} characters")
                self._environment.tick()
                pieces.append(piece)
        except Refused as error:
            raise InvalidRequest("messages", f"the chat template refuses them: {error}") from None
        except Exceeded as error:
            raise InvalidRequest("messages", f"the chat template was stopped: {error}") from None
        except _FAILURES as error:
            raise InvalidRequest("messages", f"the chat template failed on them: {_why(error)}") from None
        return "".join(pieces)


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__
