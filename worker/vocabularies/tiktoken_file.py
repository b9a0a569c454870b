"""Rank files of `tiktoken` ("base64 rank" a line): qwen.tiktoken, and GLM-4's tokenizer.model.

The patterns that cut a text into words, and the special tokens behind the ranks, are those that the models were
published with (github.com/QwenLM/Qwen, tokenization_note.md; github.com/THUDM/GLM-4).
"""

from __future__ import annotations

import base64
import binascii
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from flm.worker.errors import CheckpointError
from flm.worker.vocabularies.base import AddedToken, SplitVocabulary
from flm.worker.vocabularies.config import TokenizerConfig

MAX_RANK = 1 << 24  # a list is made of as many entries
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Kind:
    """What a rank file leaves out. specials: by id, from the number of ranks on; of them `prefix` begins a text."""

    digits: str
    normal_form: bool  # texts are brought into Unicode's NFC first
    specials: tuple[str, ...]
    eos: str
    prefix: tuple[str, ...] = ()


QWEN = Kind(
    r"\p{N}",
    True,
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
    "<|endoftext|>",
)
GLM4 = Kind(
    r"\p{N}{1,3}",
    False,
    (
        *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
        *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    ),
    "<|endoftext|>",
    ("[gMASK]", "<sop>"),
)


class RankBytes:
    """Bytes of each token; an id that nothing has gives none."""

    strip = 0

    def __init__(self, ranks: Mapping[bytes, int], added: Mapping[str, AddedToken]) -> None:
        self._bytes = {i: token for token, i in ranks.items()}
        self._bytes |= {token.id: spelt.encode() for spelt, token in added.items()}

    def __getitem__(self, token_id: int) -> bytes:
        return self._bytes.get(token_id, b"")


class RankVocabulary(SplitVocabulary):
    """Byte-pair encoding by ranks. Tokens that are no UTF-8 are spelt with U+FFFD, and found by their ids only."""

    def __init__(
        self, kind: Kind, ranks: dict[bytes, int], added: Mapping[str, AddedToken], prefix: Sequence[int]
    ) -> None:
        spelt: list[str | None] = [None] * (max(ranks.values()) + 1)
        for token, i in ranks.items():
            spelt[i] = token.decode("utf-8", "replace")
        super().__init__(spelt, added, prefix)
        self.longest = max(map(len, ranks), default=1)
        self.longest = max(self.longest, *(len(token.encode()) for token in added))
        self.pieces = RankBytes(ranks, added)
        self._normal_form = kind.normal_form
        pattern = _WORDS.replace("DIGITS", kind.digits)
        self._encoding = tiktoken.Encoding("ranks", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def _encode_run(self, run: str, first: bool, parse_special: bool) -> list[int]:
        text = unicodedata.normalize("NFC", run) if self._normal_form else run
        return self._encoding.encode_ordinary(text)


def read(
    file: Path, data: bytes, kind: Kind, config: TokenizerConfig
) -> tuple[RankVocabulary, list[str | None]]:
    """The vocabulary, and its tokens that begin and end a text. Raises CheckpointError."""
    ranks = parse(data, file)
    first = max(ranks.values()) + 1
    added = {spelt: AddedToken(i) for i, spelt in enumerate(kind.specials, first)}
    if config.added:
        added = config.added
        inside = [(spelt, token.id) for spelt, token in added.items() if token.id < first]
        if inside:
            raise config.fields.fail(
                f"added token {inside[0][0]!r}: an id from {first} on expected, found {inside[0][1]}"
            )
    prefix = [added[spelt].id for spelt in kind.prefix if spelt in added]
    return RankVocabulary(kind, ranks, added, prefix), [None, kind.eos if kind.eos in added else None]


def parse(data: bytes, file: Path) -> dict[bytes, int]:
    """Ranks by token. Raises CheckpointError naming the line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (binascii.Error, ValueError):
            raise CheckpointError(
                str(file), f"line {number}: a token in base64 and its rank expected, found {line[:40]!r}"
            ) from None
    missing = set(range(256)) - {token[0] for token in ranks if len(token) == 1}
    if missing:
        raise CheckpointError(str(file), f"ranks of all 256 bytes expected, {len(missing)} are missing")
    if (
        len(set(ranks.values())) < len(ranks)
        or not 0 <= min(ranks.values()) <= max(ranks.values()) < MAX_RANK
    ):
        raise CheckpointError(
            str(file), f"a rank of its own, from 0 to {MAX_RANK - 1}, expected for every token"
        )
    return ranks
