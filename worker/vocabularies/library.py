"""Vocabularies of the `tokenizers` library: tokenizer.json, GPT-2's vocab.json with merges.txt, and GGUF's "gpt2"."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken as RustAddedToken
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from flm.worker.errors import CheckpointError
from flm.worker.files.json_fields import read_json
from flm.worker.vocabularies import patterns, token_bytes
from flm.worker.vocabularies.base import AddedToken
from flm.worker.vocabularies.config import TokenizerConfig


class LibraryVocabulary:
    """A tokenizer of the library, which finds its special tokens itself. texts: added tokens that are no more than
    what they spell, also where that is a byte in GPT-2's alphabet; by default those that its model does not know."""

    def __init__(self, inner: RustTokenizer, texts: Iterable[str] | None = None) -> None:
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
        if texts is None:
            texts = [token for token in self.added if inner.model.token_to_id(token) is None]
        self.pieces = token_bytes.of_decoder(decoder, inner.id_to_token, texts)

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


def read_json_file(file: Path, config: TokenizerConfig) -> LibraryVocabulary:
    """tokenizer.json, with what tokenizer_config.json says besides: tokens that it lacks or does not know as special,
    and what stands around a text. Raises CheckpointError."""
    try:
        inner = RustTokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(str(file), f"not a tokenizer that can be read: {error}") from error
    own = {token.content for token in inner.get_added_tokens_decoder().values()}
    new = {spelt: token for spelt, token in config.added.items() if inner.token_to_id(spelt) is None}
    add_tokens(inner, {spelt: token for spelt, token in config.added.items() if spelt not in own})
    _check_added(inner, new, config)
    special = config.roles | {spelt for spelt, token in config.added.items() if token.special}
    inner = _with_special(inner, special)
    _set_ends(inner, config)
    return LibraryVocabulary(inner)


def _with_special(inner: RustTokenizer, tokens: AbstractSet[str]) -> RustTokenizer:
    """Those of these tokens that there are, are special: found in a text as they are spelt, and no text of an answer.
    Not single characters, which a checkpoint that pads with "!" has in its answers."""
    tokens = {token for token in tokens if len(token) > 1 and inner.token_to_id(token) is not None}
    added = {token.content: token.special for token in inner.get_added_tokens_decoder().values()}
    inner.add_special_tokens([RustAddedToken(t, normalized=False) for t in sorted(tokens - added.keys())])
    if all(added.get(token, True) for token in tokens):
        return inner
    state = json.loads(inner.to_str())  # the library takes no second word on a token that it has
    for token in state["added_tokens"]:
        token["special"] |= token["content"] in tokens
    return RustTokenizer.from_str(json.dumps(state))


def _set_ends(inner: RustTokenizer, config: TokenizerConfig) -> None:
    """add_bos_token and add_eos_token, where they are stated, in place of what tokenizer.json puts around a text. A
    Llama's tokenizer.json that puts nothing there means a beginning of sequence, as its class does."""
    stated = any(config.fields.get(f"add_{name}") is not None for name in ("bos_token", "eos_token"))
    llama = config.kind.removesuffix("Fast") == "LlamaTokenizer" and inner.post_processor is None
    if not (stated or llama):
        return
    ends: list[list[str]] = []
    for name, default in (("bos_token", llama), ("eos_token", False)):
        token = config.token(name) if config.fields.flag(f"add_{name}", default) else None
        ends.append([token] if token is not None and inner.token_to_id(token) is not None else [])
    bos, eos = ends
    named = [(token, inner.token_to_id(token)) for token in {*bos, *eos}]
    inner.post_processor = processors.TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=named)


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
    _check_added(inner, config.added, config)
    return LibraryVocabulary(_with_special(inner, config.roles))


def _check_added(inner: RustTokenizer, added: Mapping[str, AddedToken], config: TokenizerConfig) -> None:
    for spelt, token in added.items():
        found = inner.token_to_id(spelt)
        if found != token.id:
            raise config.fields.fail(
                f"added token {spelt!r}: id {found}, the next free one, expected, found {token.id}"
            )


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
