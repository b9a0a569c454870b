"""What every kind of tokenizer offers, and how special tokens are found in a text before anything else is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text as it is spelt, before the rest is cut into tokens.

    special: it means something to the model and is no text of an answer. lstrip, rstrip: it takes the white space
    before or behind it along. after: it only counts where this stands right before it.
    """

    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    after: str = ""


class TokenBytesLike(Protocol):
    """UTF-8 bytes of each token, maybe a part of a character; empty for an id that no token has."""

    @property
    def strip(self) -> int: ...  # spaces to take from the front of a whole text

    def __getitem__(self, token_id: int) -> bytes: ...


class Vocabulary(Protocol):
    """One kind of tokenizer. Ids are below `size`. `pieces` is None where tokens are not plain bytes one behind the
    other: then decode() is asked for the text."""

    @property
    def size(self) -> int: ...
    @property
    def added(self) -> Mapping[str, AddedToken]: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def pieces(self) -> TokenBytesLike | None: ...
    @property
    def longest(self) -> int: ...  # bytes that one token stands for, at most

    def token_id(self, token: str) -> int | None: ...
    def token(self, token_id: int) -> str | None: ...

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """`text` has no lone surrogates. add_special: with what the model wants around a text. Without
        parse_special, special tokens that are spelt out are text."""

    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...


class Splitter:
    """Takes texts apart at added tokens."""

    def __init__(self, added: Mapping[str, AddedToken]) -> None:
        self._added = added
        self._all = _pattern(added)
        self._plain = _pattern({spelt: token for spelt, token in added.items() if not token.special})

    def parts(self, text: str, parse_special: bool = True) -> Iterator[str | int]:
        """Ids of added tokens, and the texts between them that are not empty. Without parse_special only tokens
        that are not special count."""
        pattern = self._all if parse_special else self._plain
        end = 0
        for found in pattern.finditer(text) if pattern else ():
            if found.start() > end:
                yield text[end : found.start()]
            yield self._added[found[found.lastindex or 0]].id
            end = found.end()
        if end < len(text):
            yield text[end:]


def _pattern(added: Mapping[str, AddedToken]) -> re.Pattern[str] | None:
    """The longest first, as one may begin another."""
    space = {False: "", True: r"\s*"}
    parts = [
        (f"(?<={re.escape(token.after)})" if token.after else "")
        + f"{space[token.lstrip]}({re.escape(spelt)}){space[token.rstrip]}"
        for spelt, token in sorted(added.items(), key=lambda item: -len(item[0]))
    ]
    return re.compile("|".join(parts)) if parts else None


class SplitVocabulary:
    """A vocabulary of which only the texts between added tokens are left to do: subclasses give _encode_run().

    `tokens`: how each id is spelt, by id (None: no token). `added` may hold ids beyond them.
    """

    def __init__(
        self,
        tokens: Sequence[str | None],
        added: Mapping[str, AddedToken],
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
    ) -> None:
        self.added = dict(added)
        self.size = max([len(tokens), *(token.id + 1 for token in added.values())])
        self._tokens = dict(enumerate(tokens)) | {token.id: spelt for spelt, token in added.items()}
        self._ids = {spelt: i for i, spelt in self._tokens.items() if spelt is not None}
        self.special_ids = frozenset(token.id for token in added.values() if token.special)
        self.longest = max((len(spelt.encode()) for spelt in self._ids), default=1)
        self.prefix, self.suffix = list(prefix), list(suffix)  # what encode() puts around a text
        self.splitter = Splitter(self.added)

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def token(self, token_id: int) -> str | None:
        return self._tokens.get(token_id)

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self.splitter.parts(text, parse_special)):
            ids += [part] if isinstance(part, int) else self._encode_run(part, index == 0, parse_special)
        return self._with_ends(ids) if add_special else ids

    def _encode_run(self, run: str, first: bool, parse_special: bool) -> list[int]:
        """Tokens of a text without added tokens. first: nothing stands before it."""
        raise NotImplementedError

    def _with_ends(self, ids: list[int]) -> list[int]:
        return self.prefix + ids + self.suffix

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        raise AssertionError("vocabularies of this kind have pieces")
