"""From messages to the tokens of a prompt, in which only the template's own special tokens are special.

What a client writes into a message stays text, also where it spells "<|im_end|>": else a user could speak as the
system. The usual text, which spells none, is tokenised as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from flm.cluster.prompts.templates import FIX_TOKEN, SEPARATE, ChatTemplate
from flm.worker.errors import InvalidRequest
from flm.worker.vocabularies.tokenizer import Tokenizer

# Stand-ins come from the private use planes: U+F0000 to U+FFFFD and U+100000 to U+10FFFD.
_PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_MARKS_BEGIN = "<FLM_"  # no mark begins in a message
_MARK = re.compile(f"{FIX_TOKEN.pattern}|{SEPARATE}")


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation. `rendered` has marks for token ids, and a stand-in for every special token, and
    for the beginning of every mark, that a message spells."""

    tokenizer: Tokenizer
    rendered: str
    stand_ins: dict[str, str] = field(default_factory=dict)  # stand-in → what was spelt

    @property
    def text(self) -> str:
        text_of = self.tokenizer.token_text
        shown = [text_of(part) if isinstance(part, int) else part for part in self._parts()]
        return self._restored("".join(shown))

    def encode(self) -> list[int]:
        """Token ids; the template has put special tokens where they belong."""
        ids: list[int] = []
        for part in self._parts():
            ids += [part] if isinstance(part, int) else self._encode_part(part)
        return ids

    def _parts(self) -> Iterator[str | int]:
        """Token ids that the template gives, and the texts between them, each to be tokenised by itself."""
        end = 0
        for mark in _MARK.finditer(self.rendered):
            if mark.start() > end:
                yield self.rendered[end : mark.start()]
            if mark[1] is not None:
                yield self._checked(int(mark[1]))
            end = mark.end()
        if end < len(self.rendered):
            yield self.rendered[end:]

    def _checked(self, token_id: int) -> int:
        if token_id >= self.tokenizer.vocab_size:
            raise InvalidRequest(
                "messages",
                f"this model's prompt has the token id {token_id}; expected ids below {self.tokenizer.vocab_size}",
            )
        return token_id

    def _encode_part(self, text: str) -> list[int]:
        if not any(mark in text for mark in self.stand_ins):
            return self.tokenizer.encode(text, False)
        ids: list[int] = []
        # The tokenizer too takes a text apart at special tokens first: the runs between them are the same.
        for part in self.tokenizer.split_special(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self.tokenizer.encode(self._restored(part), False, parse_special=False)
        return ids

    def _restored(self, text: str) -> str:
        return text.translate({ord(mark): spelt for mark, spelt in self.stand_ins.items()})


def render_chat(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[dict[str, str]]
) -> ChatPrompt:
    """`messages`: role and content each. InvalidRequest where the template refuses them."""
    joined = "\n".join(message["content"] for message in messages)
    found = {token for token in (*tokenizer.special_tokens, _MARKS_BEGIN) if token in joined}
    if not found:
        return ChatPrompt(tokenizer, template.render(messages))
    spelt = sorted(found, key=len, reverse=True)
    marks = dict(zip(spelt, _unused(joined), strict=False))
    pattern = re.compile("|".join(map(re.escape, spelt)))
    safe = [m | {"content": pattern.sub(lambda f: marks[f[0]], m["content"])} for m in messages]
    return ChatPrompt(tokenizer, template.render(safe), {mark: s for s, mark in marks.items()})


def _unused(text: str) -> Iterator[str]:
    """Characters that the text does not have."""
    taken = set(text)
    return (chr(code) for plane in _PRIVATE for code in plane if chr(code) not in taken)
