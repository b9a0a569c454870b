"""Rendering conversations beside the event loop: a template is a program, and may take as long as its sandbox allows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from flm.cluster.prompts.chat_prompt import ChatPrompt, render_chat
from flm.cluster.prompts.templates import ChatTemplate
from flm.worker.errors import Overloaded
from flm.worker.vocabularies.tokenizer import Tokenizer

MAX_WAITING = 64  # conversations of one model, the one that is being rendered included


class Renderer:
    """One model's template on a thread of its own, one conversation after the other. Belongs to one event loop."""

    def __init__(self, model: str, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._model, self._template, self._tokenizer = model, template, tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"chat {model}")
        self._waiting = 0

    async def render(self, messages: Sequence[dict[str, str]]) -> tuple[ChatPrompt, str]:
        """The prompt, and its text. InvalidRequest where the template refuses the messages or takes too long,
        Overloaded where too many wait for it."""
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"{self._waiting} conversations wait for the chat template of {self._model!r}")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._render, messages)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Nothing more is rendered, but for the one that is under way."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _render(self, messages: Sequence[dict[str, str]]) -> tuple[ChatPrompt, str]:
        prompt = render_chat(self._template, self._tokenizer, messages)
        return prompt, prompt.text
