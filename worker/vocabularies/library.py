"""Vocabularies of the `tokenizers` library: tokenizer.json, GPT-2's vocab.json with merges.txt, and GGUF's "gpt2"."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer

from flm.worker import token_bytes
from flm.worker.errors import CheckpointError
from flm.worker.vocabularies.base import AddedToken


class LibraryVocabulary:
    """A tokenizer of the library, which finds its special tokens itself."""

    def __init__(self, inner: RustTokenizer) -> None:
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        tokens = inner.get_added_tokens_decoder()
        self.size = max([inner.get_vocab_size(with_added_tokens=False), *(i + 1 for i in tokens)])
        self.added: Mapping[str, AddedToken] = {
            token.content: AddedToken(i, token.special, token.lstrip, token.rstrip)
            for i, token in tokens.items()
            if token.content
        }
        self.special_ids = frozenset(i for i, token in tokens.items() if token.special)
        decoder = None if inner.decoder is None else json.loads(inner.decoder.__getstate__())
        self.pieces = token_bytes.of_decoder(decoder, inner.id_to_token)

    @cached_property
    def longest(self) -> int:
        """Bytes that one token stands for, at most."""
        return max(len(token.encode("utf-8")) for token in self.inner.get_vocab(with_added_tokens=True))

    @cached_property
    def _plain(self) -> RustTokenizer:
        """A copy that reads special tokens as text: the switch is the tokenizer's, and threads share that."""
        plain = RustTokenizer.from_str(self.inner.to_str())
        plain.encode_special_tokens = True
        return plain

    def token_id(self, token: str) -> int | None:
        found: int | None = self.inner.token_to_id(token)
        return found

    def token(self, token_id: int) -> str | None:
        found: str | None = self.inner.id_to_token(token_id)
        return found

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        inner = self.inner if parse_special else self._plain
        return list(inner.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=skip_special))


def read_json_file(file: Path) -> LibraryVocabulary:
    """tokenizer.json. Raises CheckpointError."""
    try:
        return LibraryVocabulary(RustTokenizer.from_file(str(file)))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(str(file), f"not a tokenizer that can be read: {error}") from error
