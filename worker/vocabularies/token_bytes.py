"""What each token stands for in UTF-8 bytes, so that a stream can be decoded one token at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@dataclass
class TokenBytes:
    """Bytes of every token of one vocabulary, worked out when first asked for. `token`: how an id is spelt."""

    token: Callable[[int], str | None]
    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strip: int = 0  # spaces to take from the front of a whole text
    texts: Mapping[str, str] = field(default_factory=dict)  # of tokens that are not spelt as they read
    _table: dict[str, int] = field(default_factory=byte_level_alphabet)
    _known: dict[int, bytes] = field(default_factory=dict)

    def __getitem__(self, token_id: int) -> bytes:
        """The token's bytes, maybe a part of a character; empty for an id that the tokenizer does not know."""
        found = self._known.get(token_id)
        if found is None:
            token = self.token(token_id)
            found = self._known[token_id] = b"" if token is None else self._bytes(token)
        return found

    def _bytes(self, token: str) -> bytes:
        if token in self.texts:
            return self.texts[token].encode("utf-8")
        if self.byte_level:
            if all(c in self._table for c in token):
                return bytes(self._table[c] for c in token)
            return token.encode("utf-8")
        byte = _BYTE_TOKEN.fullmatch(token) if self.byte_fallback else None
        if byte:
            return bytes([int(byte[1], 16)])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode("utf-8")


def of_decoder(
    decoder: dict[str, Any] | None, token: Callable[[int], str | None], texts: Iterable[str] = ()
) -> TokenBytes | None:
    """TokenBytes for a decoder of the `tokenizers` library, in its JSON form; None where it does more than put
    bytes one behind the other. texts: tokens of byte-level vocabularies that are not spelt in GPT-2's alphabet:
    DeepSeek-Coder has added one for "ü", which is the byte FC there."""
    if decoder is None:
        return None
    steps = _flat(decoder)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return TokenBytes(token, byte_level=True, texts={spelt: spelt for spelt in texts})
    if kinds == ["Metaspace"]:
        strip = 0 if steps[0].get("prepend_scheme") == "never" else 1
        return TokenBytes(token, replacements=((steps[0]["replacement"], " "),), strip=strip)
    if kinds not in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        return None
    pattern, strip_step = steps[0]["pattern"].get("String"), steps[3] if len(steps) == 4 else None
    if pattern is None or (strip_step and (strip_step["content"] != " " or strip_step["stop"])):
        return None
    strip = strip_step["start"] if strip_step else 0
    replacements = ((pattern, steps[0]["content"]),)
    return TokenBytes(token, byte_fallback=True, replacements=replacements, strip=strip)


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flat(inner)]
