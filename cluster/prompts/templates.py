"""Chat templates: the Jinja programs that checkpoints bring along, run where they can do no harm.

Programs of our own for checkpoints without any are in prompt_formats.

They see the messages and a few functions that the field agreed on, nothing else; the text they may make and the
time they may take are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import jinja2

from flm.cluster.prompts.template_sandbox import MAX_CHARACTERS, BoundedEnvironment, Exceeded, Refused
from flm.worker.errors import InvalidRequest

# What stands in a rendered text for a token id (fastllm's notation), and for a place where the tokenizer begins anew.
FIX_TOKEN = re.compile(r"<FLM_FIX_TOKEN_(\d{1,9})>")
SEPARATE = "<FLM_SEPARATE>"
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
    """One model's template. Not for use from several threads at once.

    texts: variables of the program. token_id: how it finds ids by token(). stop_ids and stop_strings end its answers.
    """

    def __init__(
        self,
        source: str,
        bos_token: str = "",
        eos_token: str = "",
        *,
        texts: Mapping[str, object] | None = None,
        token_id: Callable[[str], int | None] = lambda token: None,
        stop_ids: tuple[int, ...] = (),
        stop_strings: tuple[str, ...] = (),
    ) -> None:
        self.stop_ids, self.stop_strings = stop_ids, stop_strings
        self._environment = BoundedEnvironment()
        self._variables = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "separate": SEPARATE,
            # What the field's renderer gives besides; templates ask whether it is there in more ways than one.
            "tools": None,
            "documents": None,
            **(texts or {}),
        }
        self._variables["token"] = lambda token: _mark(token, token_id(token))
        self._problem = ""
        try:
            self._template = self._environment.from_string(source)
        except _FAILURES as error:
            # The model can still serve Generate; Chat says why it cannot.
            self._problem = f"this model's chat template is broken: {_why(error)}"

    @classmethod
    def unusable(cls, problem: str) -> ChatTemplate:
        """In place of a template: what there is to say when one is asked for."""
        template = cls("")
        template._problem = problem
        return template

    @property
    def problem(self) -> str:
        """Why no conversation can be rendered, or ""."""
        return self._problem

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
                messages=list(messages), add_generation_prompt=True, **self._variables
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


def _mark(token: str, token_id: int | None) -> str:
    if token_id is None:
        raise Refused(f"its tokenizer has no token {token!r}")
    return f"<FLM_FIX_TOKEN_{token_id}>"


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__
