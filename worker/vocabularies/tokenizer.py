"""Text to token ids and back, for whole texts and for streams."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from flm.worker.errors import InvalidRequest
from flm.worker.vocabularies.base import AddedToken, Splitter, TokenBytesLike, Vocabulary

_CONTEXT = 16  # tokens before a stream that can still hold the beginning of its first character


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer. Texts in which special tokens are spelt out give these tokens, as chat templates need."""

    vocabulary: Vocabulary
    bos_token: str | None = None
    eos_token: str | None = None
    chat_template: str | None = None
    rows: int | None = None  # of the model's embedding, where it is known

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return self.vocabulary.size if self.rows is None else min(self.vocabulary.size, self.rows)

    @property
    def special_ids(self) -> frozenset[int]:
        return self.vocabulary.special_ids

    @property
    def pieces(self) -> TokenBytesLike | None:
        return self.vocabulary.pieces

    @property
    def longest_token(self) -> int:
        """Bytes that one token stands for, at most."""
        return self.vocabulary.longest

    @cached_property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self.token_id(self.bos_token)

    @cached_property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self.token_id(self.eos_token)

    @cached_property
    def special_tokens(self) -> Mapping[str, AddedToken]:
        """Special tokens by how they are spelt."""
        return {spelt: token for spelt, token in self.vocabulary.added.items() if token.special}

    @cached_property
    def _splitter(self) -> Splitter:
        return Splitter(self.special_tokens)

    def warm(self) -> None:
        """Do now what the first texts would have to wait for: half a second of work where the vocabulary is large."""
        for parse_special in (True, False):
            self.vocabulary.encode("a", False, parse_special)
        _ = self.longest_token, self._splitter, self.bos_token_id, self.eos_token_id

    def token_id(self, token: str) -> int | None:
        return self.vocabulary.token_id(token)

    def token(self, token_id: int) -> str | None:
        """How the vocabulary spells it, with its own marks for spaces and bytes."""
        return self.vocabulary.token(token_id)

    def token_text(self, token_id: int) -> str:
        """Of the token within a text: decode() takes the space from the front of a whole one."""
        if self.pieces is None:
            return self.decode([token_id], False)
        return self.pieces[token_id].decode("utf-8", "replace")

    def split_special(self, text: str) -> Iterator[str | int]:
        """Ids of the special tokens that the text spells, and the texts between them."""
        return self._splitter.parts(text)

    def encode(self, text: str, add_special: bool = True, *, parse_special: bool = True) -> list[int]:
        """Token ids. add_special adds what the model wants around a text (often a beginning-of-sequence token);
        leave it out for texts made by a chat template. Without parse_special, special tokens that are spelt out are
        text like any other. Raises InvalidRequest for lone
        surrogates and for tokens that the model does not have."""
        try:
            text.encode("utf-8")
        except UnicodeError as error:
            raise InvalidRequest("prompt", f"valid Unicode text expected: {error}") from error
        ids = self.vocabulary.encode(text, add_special, parse_special)
        if self.rows is not None and ids and max(ids) >= self.rows:
            raise InvalidRequest("prompt", f"the model has no row for the token {self.token(max(ids))!r}")
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of the tokens; bytes that are no UTF-8 become U+FFFD, ids that no token has are left out."""
        if any(i < 0 for i in ids):
            raise InvalidRequest("ids", f"token ids >= 0 expected, got {min(ids)}")
        if self.pieces is None:
            return self.vocabulary.decode(ids, skip_special)
        kept = [i for i in ids if not (skip_special and i in self.special_ids)]
        text = b"".join([self.pieces[i] for i in kept]).decode("utf-8", "replace")
        return _stripped(text, self.pieces.strip)


class IncrementalDecoder:
    """The text of a stream, token by token, in whole characters only: the beginning of a character waits for its
    rest. All pieces together are what decode() gives for all ids. Constant time per token.

    `after`: the tokens before the stream, where it continues a text: then a leading space is kept, and a
    character that began there is finished here.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = 0 if after or tokenizer.pieces is None else tokenizer.pieces.strip
        self._window: list[int] = []  # only for tokenizers whose tokens are not plain bytes
        self._settled = 0
        for token_id in after[-_CONTEXT:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that this token completes, often empty within a character."""
        if token_id in self._skip:
            return ""
        pieces = self._tokenizer.pieces
        if pieces is None:
            return self._push_window(token_id)
        text = self._utf8.decode(pieces[token_id])
        return self._strip_front(text) if self._strip else text

    def flush(self) -> str:
        """The end of the stream: U+FFFD for a character that was never completed, else nothing."""
        if self._tokenizer.pieces is None:
            return self._advance_window()
        return self._strip_front(self._utf8.decode(b"", final=True))

    def _strip_front(self, text: str) -> str:
        if text:
            text, self._strip = _stripped(text, self._strip), 0
        return text

    def _push_window(self, token_id: int) -> str:
        """Decode a few tokens before the new one with and without it; the difference is its text."""
        self._window.append(token_id)
        if self._text(self._window).endswith("\ufffd") and len(self._window) - self._settled < _CONTEXT:
            return ""
        return self._advance_window()

    def _advance_window(self) -> str:
        before = self._text(self._window[: self._settled])
        new = self._text(self._window)[len(before) :]
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        return new

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special)


def _stripped(text: str, spaces: int) -> str:
    for _ in range(spaces):
        text = text.removeprefix(" ")
    return text
