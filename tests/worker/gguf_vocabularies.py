"""GGUF files that hold nothing but a small vocabulary, of both kinds, and texts to try on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from gguf_writer import write
from tokenizers import pre_tokenizers

SPACE = "\u2581"
CORPUS = (
    "the cat sat on the mat and the dog sat on the cat while the rain in Spain stays mainly in the plain "
    "she sells sea shells on the sea shore and the shells that she sells are sea shells I am sure "
)
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand\n\nlines \n",
    "12345 67,890.12 x2y3",
    "naïve café Ångström ﬁne",
    "日本語のテキスト и русский текст",
    "🎉 👩‍👩‍👧‍👦 🇨🇭 e\u0301\u200b",
    "don't I'll WE'VE",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a\u0000b\ufffdc\U0010ffff",
]


def sentencepiece_vocab() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types as SentencePiece trains them: the most frequent pairs of CORPUS joined first."""
    words = Counter(SPACE + word for word in CORPUS.split())
    pieces = {word: list(word) for word in words}
    joined: list[str] = []
    for _ in range(40):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        joined += [left + right] if left + right not in joined else []
        for word, parts in pieces.items():
            merged = "\x00".join(parts).replace(f"{left}\x00{right}", left + right)
            pieces[word] = merged.split("\x00")
    letters = sorted({c for word in words for c in word})
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *joined, *letters, "<|user|>"]
    scores = (
        [0.0] * 259 + [-float(i) for i in range(len(joined))] + [-1000.0 - i for i in range(len(letters) + 1)]
    )
    types = [2, 3, 3, *[6] * 256, *[1] * (len(joined) + len(letters)), 4]
    return tokens, scores, types


def sentencepiece_gguf(path: Path, edit: Callable[[GGUFWriter], Any] = lambda w: None) -> Path:
    tokens, scores, types = sentencepiece_vocab()
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    edit(writer)
    write(writer)
    return path


def byte_level_gguf(path: Path, pre: str | None, edit: Callable[[GGUFWriter], Any] = lambda w: None) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["t h", "th e", "Ġ the", "1 2", "12 3", "2 3", "i n"]
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    tokens = [*alphabet, *(m.replace(" ", "") for m in merges), "<s>", "</s>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    edit(writer)
    write(writer)
    return path
