"""Text to token ids and back, for whole texts and for streams."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from flm.worker.errors import CheckpointError, InvalidRequest
from flm.worker.families.fields import Fields, read_json
from flm.worker.gguf_file import GGUFFile
from flm.worker.token_bytes import token_bytes
from flm.worker.tokenizer_gguf import build_tokenizer

_CONTEXT = 16  # tokens before a stream that can still hold the beginning of its first character


class Tokenizer:
    """A model's tokenizer. Texts in which special tokens are spelt out give these tokens, as chat templates need."""

    def __init__(
        self,
        inner: RustTokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        self.bos_token, self.eos_token = bos_token, eos_token
        self.bos_token_id = None if bos_token is None else inner.token_to_id(bos_token)
        self.eos_token_id = None if eos_token is None else inner.token_to_id(eos_token)
        self.chat_template = chat_template
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        added = inner.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.pieces = token_bytes(inner)

    @cached_property
    def longest_token(self) -> int:
        """Bytes that one token stands for, at most."""
        return max(len(token.encode("utf-8")) for token in self.inner.get_vocab(with_added_tokens=True))

    @cached_property
    def special_tokens(self) -> dict[str, AddedToken]:
        """Special tokens by how they are spelt."""
        added = self.inner.get_added_tokens_decoder().values()
        return {token.content: token for token in added if token.special and token.content}

    @cached_property
    def _plain(self) -> RustTokenizer:
        """A copy that reads special tokens as text: the switch is the tokenizer's, and threads share that."""
        plain = RustTokenizer.from_str(self.inner.to_str())
        plain.encode_special_tokens = True
        return plain

    def encode(self, text: str, add_special: bool = True, *, parse_special: bool = True) -> list[int]:
        """Token ids. add_special adds what the model wants around a text (often a beginning-of-sequence token);
        leave it out for texts made by a chat template. Without parse_special, special tokens that are spelt out are
        text like any other. Raises InvalidRequest for lone surrogates."""
        inner = self.inner if parse_special else self._plain
        try:
            return list(inner.encode(text, add_special_tokens=add_special).ids)
        except (UnicodeError, TypeError) as error:
            raise InvalidRequest("prompt", f"valid Unicode text expected: {error}") from error

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of the tokens; bytes that are no UTF-8 become U+FFFD, ids that no token has are left out."""
        if any(i < 0 for i in ids):
            raise InvalidRequest("ids", f"token ids >= 0 expected, got {min(ids)}")
        if self.pieces is None:
            return str(self.inner.decode(list(ids), skip_special_tokens=skip_special))
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


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model directory (tokenizer.json) or of a .gguf file. Raises CheckpointError."""
    if not path.is_dir():
        return _from_gguf(GGUFFile(path))
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(str(path), "expected tokenizer.json in this directory")
    try:
        inner = RustTokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(str(file), f"not a tokenizer that can be read: {error}") from error
    config_path = path / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else Fields(config_path, {})
    return Tokenizer(
        inner,
        bos_token=_token_text(config, "bos_token"),
        eos_token=_token_text(config, "eos_token"),
        chat_template=_template(path, config),
    )


def _from_gguf(file: GGUFFile) -> Tokenizer:
    inner = build_tokenizer(file)
    ids = {name: file.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    texts = {name: inner.id_to_token(i) if type(i) is int and i >= 0 else None for name, i in ids.items()}
    template = file.get("tokenizer.chat_template")
    return Tokenizer(
        inner,
        bos_token=texts["bos"],
        eos_token=texts["eos"],
        chat_template=template if isinstance(template, str) else None,
    )


def _token_text(config: Fields, name: str) -> str | None:
    """A token as a string, or as the object that older files keep."""
    value: Any = config.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise config.fail(f"{name}: a token's text expected, found {value!r}")
    return value


def _template(directory: Path, config: Fields) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise CheckpointError(str(file), f"cannot be read: {error}") from error
    value = config.get("chat_template")
    if isinstance(value, list):  # several named templates
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise config.fail(f"chat_template: a template's text expected, found {type(value).__name__}")
    return value


def _stripped(text: str, spaces: int) -> str:
    for _ in range(spaces):
        text = text.removeprefix(" ")
    return text
