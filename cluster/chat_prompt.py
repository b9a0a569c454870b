"""From messages to the tokens of a prompt, in which only the template's own special tokens are special.

What a client writes into a message stays text, also where it spells "<|im_end|>": else a user could speak as the
system. The usual text, which spells none, is tokenised as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from flm.cluster.templates import ChatTemplate
from flm.worker.tokenizer import Tokenizer

# Stand-ins come from the private use planes: U+F0000 to U+FFFFD and U+100000 to U+10FFFD.
_PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation. `rendered` has a stand-in for every special token that a message spells."""

    tokenizer: Tokenizer
    rendered: str
    stand_ins: dict[str, str] = field(default_factory=dict)  # stand-in → what was spelt

    @property
    def text(self) -> str:
        return self._restored(self.rendered)

    def encode(self) -> list[int]:
        """Token ids; the template has put special tokens where they belong."""
        tokenizer = self.tokenizer
        if not self.stand_ins:
            return tokenizer.encode(self.rendered, False)
        ids: list[int] = []
        # The tokenizer too takes a text apart at special tokens first: the runs between them are the same.
        for part in tokenizer.split_special(self.rendered):
            ids += [part] if isinstance(part, int) else self._encode_run(part)
        return ids

    def _encode_run(self, run: str) -> list[int]:
        return self.tokenizer.encode(self._restored(run), False, parse_special=False)

    def _restored(self, text: str) -> str:
        return text.translate({ord(mark): spelt for mark, spelt in self.stand_ins.items()})


def render_chat(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[dict[str, str]]
) -> ChatPrompt:
    """`messages`: role and content each. InvalidRequest where the template refuses them."""
    joined = "\n".join(message["content"] for message in messages)
    spelt = sorted((s for s in tokenizer.special_tokens if s in joined), key=len, reverse=True)
    if not spelt:
        return ChatPrompt(tokenizer, template.render(messages))
    marks = dict(zip(spelt, _unused(joined), strict=False))
    pattern = re.compile("|".join(map(re.escape, spelt)))
    safe = [m | {"content": pattern.sub(lambda f: marks[f[0]], m["content"])} for m in messages]
    return ChatPrompt(tokenizer, template.render(safe), {mark: s for s, mark in marks.items()})


def _unused(text: str) -> Iterator[str]:
    """Characters that the text does not have."""
    taken = set(text)
    return (chr(code) for plane in _PRIVATE for code in plane if chr(code) not in taken)
