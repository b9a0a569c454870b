"""The keys of a model in cluster.yaml that say how conversations become prompts."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from flm.cluster.prompts.prompt_choice import TEXTS, PromptChoice
from flm.cluster.prompts.prompt_formats import FORMATS


def _format(value: str) -> str:
    if value and value not in FORMATS:
        raise ValueError(f"expected one of {', '.join(sorted(FORMATS))}, got {value!r}")
    return value


_Text = Annotated[str, Field(max_length=65536)] | None


class PromptFields(BaseModel):
    """Empty: the checkpoint's own template, or a built-in format for its family. The four texts are fastllm's."""

    prompt_format: Annotated[str, AfterValidator(_format)] = ""
    pre_prompt: _Text = None
    user_role: _Text = None
    bot_role: _Text = None
    history_sep: _Text = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in TEXTS if getattr(self, name) is not None]
        if self.prompt_format and given:
            raise ValueError(f"expected either prompt_format or {', '.join(given)}, got both")
        return self

    @property
    def prompt(self) -> PromptChoice:
        texts = tuple(getattr(self, name) for name in TEXTS)
        if all(text is None for text in texts):
            return PromptChoice(self.prompt_format)
        pre_prompt, user_role, bot_role, history_sep = (text or "" for text in texts)
        return PromptChoice(texts=(pre_prompt, user_role, bot_role, history_sep))
