"""Vocabularies of the `tokenizers` library: tokenizer.json, GPT-2's vocab.json with merges.txt, and GGUF's "gpt2"."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken as RustAddedToken
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from flm.worker.errors import CheckpointError
from flm.worker.files.json_fields import read_json
from flm.worker.vocabularies import patterns, token_bytes
from flm.worker.vocabularies.base import AddedToken
from flm.worker.vocabularies.config import TokenizerConfig


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


# ------------------------------------------------------------------------------------- vocab.json and merges.txt

_QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast")  # the one class that cuts texts in another way than GPT-2


def read_merges(directory: Path, config: TokenizerConfig) -> LibraryVocabulary:
    """GPT-2's two files, byte-level BPE, with the tokens that the checkpoint adds. Raises CheckpointError."""
    vocab_file, merges_file = directory / "vocab.json", directory / "merges.txt"
    vocab = read_json(vocab_file).raw
    merges = _merges(merges_file)
    try:
        inner = RustTokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(str(merges_file), f"does not go with vocab.json: {error}") from error
    qwen2 = config.kind in _QWEN2
    if qwen2:
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = byte_level_splits((patterns.QWEN2,) if qwen2 else (patterns.GPT2,))
    inner.decoder = decoders.ByteLevel()
    add_tokens(inner, config.added)
    wrong = [
        (spelt, token.id) for spelt, token in config.added.items() if inner.token_to_id(spelt) != token.id
    ]
    for spelt, i in wrong:
        found = inner.token_to_id(spelt)
        raise config.fields.fail(f"added token {spelt!r}: id {found}, the next free one, expected, found {i}")
    return LibraryVocabulary(inner)


def _merges(file: Path) -> list[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise CheckpointError(str(file), f"cannot be read: {error}") from error
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, separator, right = line.rstrip("\r").partition(" ")
        if not (left and separator and right) or " " in right:
            raise CheckpointError(str(file), f"line {number}: two tokens expected, found {line[:40]!r}")
        merges.append((left, right))
    return merges


def byte_level_splits(expressions: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    """Words by one expression after the other, then bytes in GPT-2's alphabet."""
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])


def add_tokens(inner: RustTokenizer, added: Mapping[str, AddedToken]) -> None:
    """In the order of their ids: the library gives the next free one to each that its vocabulary lacks."""
    inner.add_tokens(
        [
            RustAddedToken(
                spelt, special=token.special, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False
            )
            for spelt, token in sorted(added.items(), key=lambda item: item[1].id)
        ]
    )
