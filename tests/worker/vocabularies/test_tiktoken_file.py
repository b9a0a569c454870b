"""qwen.tiktoken and GLM-4's tokenizer.model: tiktoken's own ids, the special tokens behind them, and broken files."""

from __future__ import annotations

import base64
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from gguf_vocabularies import TEXTS
from small_vocabularies import SENTENCES, byte_pairs, rank_file, write
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models

from flm.worker.errors import CheckpointError
from flm.worker.vocabularies import patterns
from flm.worker.vocabularies.files import load_tokenizer
from flm.worker.vocabularies.token_bytes import byte_level_alphabet
from flm.worker.vocabularies.tokenizer import IncrementalDecoder, Tokenizer

BPE = byte_pairs(patterns.QWEN2)
RANKS = rank_file(BPE)
SIZE = RANKS.count(b"\n")
PLAIN = [text for text in [*SENTENCES, *TEXTS, "x2024y 1234567"] if "<|" not in text]


def load(path: Path, name: str, data: bytes = RANKS, **config: Any) -> Tokenizer:
    return load_tokenizer(write(path, {name: data, "tokenizer_config.json": config}))


def by_library(text: str, pattern: str) -> list[int]:
    """What the `tokenizers` library makes of the text with the same vocabulary: merges in the order of ranks."""
    alphabet = {b: c for c, b in byte_level_alphabet().items()}
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in RANKS.splitlines()}
    vocab = {"".join(alphabet[b] for b in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            lower = tiktoken.Encoding(
                "lower",
                pat_str=r"(?s).+",
                mergeable_ranks={t: r for t, r in ranks.items() if r < rank},
                special_tokens={},
            )
            left, right = (lower.decode_single_token_bytes(i) for i in lower._encode_single_piece(token))
            merges.append(("".join(alphabet[b] for b in left), "".join(alphabet[b] for b in right)))
    inner = RustTokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = byte_pairs(pattern, 0).pre_tokenizer
    return list(inner.encode(text).ids)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = IncrementalDecoder(tokenizer, skip_special=False)
    return "".join([*[decoder.push(i) for i in ids], decoder.flush()])


@pytest.mark.parametrize(
    ("name", "pattern"), [("qwen.tiktoken", patterns.QWEN2), ("tokenizer.model", patterns.LLAMA3)]
)
def test_ids_are_those_of_two_libraries(name: str, pattern: str, tmp_path: Path) -> None:
    tokenizer = load(tmp_path, name)
    text = "\n".join(PLAIN)
    normal = unicodedata.normalize("NFC", text) if name == "qwen.tiktoken" else text
    ids = tokenizer.encode(text, add_special=False)
    assert ids == by_library(normal, pattern)
    assert any(i > 255 for i in ids)
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == normal


def test_qwen(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, "qwen.tiktoken", tokenizer_class="QWenTokenizer")
    assert tokenizer.vocab_size == SIZE + 208  # 151643 + 208 = 151851 in the published one
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|><|extra_204|>")
    assert (ids[0], ids[-2], ids[-1]) == (SIZE + 1, SIZE + 2, SIZE + 207)
    assert (tokenizer.bos_token, tokenizer.eos_token_id) == (None, SIZE)
    assert tokenizer.decode(ids) == "user\nhi"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>user\nhi<|im_end|><|extra_204|>"
    plain = tokenizer.encode("<|im_end|>", parse_special=False)
    assert max(plain) < SIZE
    assert tokenizer.decode(plain) == "<|im_end|>"
    assert len(tokenizer.encode("2024")) == 4  # every digit stands alone


def test_glm4(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, "tokenizer.model", tokenizer_class="ChatGLM4Tokenizer")
    names = (
        "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|>"
    )
    assert [tokenizer.token_id(name) for name in names.split()] == [SIZE + i for i in range(10)]
    assert tokenizer.encode("hi")[:2] == [SIZE + 2, SIZE + 4]  # [gMASK]<sop>
    assert tokenizer.encode("[gMASK]<sop><|user|>\nhi", False) == [
        *(SIZE + 2, SIZE + 4, SIZE + 7),
        *tokenizer.encode("\nhi", False),
    ]
    assert tokenizer.eos_token_id == SIZE
    other = {str(SIZE + 5): {"content": "<|user|>", "special": True}}
    assert load(tmp_path, "tokenizer.model", added_tokens_decoder=other).token_id("<|user|>") == SIZE + 5


def test_a_token_that_is_part_of_a_character(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, "qwen.tiktoken")
    ids = tokenizer.encode("世")
    assert len(ids) > 1
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert decoder.push(ids[-1]) == "世"


def test_broken_files(tmp_path: Path) -> None:
    inside = {"5": {"content": "<|user|>", "special": True}}
    for data, config, message in (
        (b"!!!! 0\n" + RANKS, {}, "line 1: a token in base64 and its rank expected"),
        (RANKS + b"QUJD x\n", {}, f"line {SIZE + 1}: a token in base64"),
        (RANKS[RANKS.index(b"\n") + 1 :], {}, "ranks of all 256 bytes expected, 1 are missing"),
        (RANKS + b"QUJDREU= 5\n", {}, "a rank of its own"),
        (RANKS + b"QUJDREU= 99999999999\n", {}, "from 0 to 16777215"),
        (b"", {}, "ranks of all 256 bytes expected"),
        (RANKS, {"added_tokens_decoder": inside}, f"an id from {SIZE} on expected, found 5"),
    ):
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path, "qwen.tiktoken", data, **config)
        assert message in str(caught.value)
