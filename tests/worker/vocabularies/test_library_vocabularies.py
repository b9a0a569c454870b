"""vocab.json with merges.txt: GPT-2's and Qwen2's words, added tokens at their ids, broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf_vocabularies import TEXTS
from small_vocabularies import SENTENCES, byte_pairs, write
from tokenizers import pre_tokenizers

from flm.worker.errors import CheckpointError
from flm.worker.vocabularies import patterns
from flm.worker.vocabularies.files import load_tokenizer
from flm.worker.vocabularies.library import byte_level_splits
from flm.worker.vocabularies.token_bytes import byte_level_alphabet
from flm.worker.vocabularies.tokenizer import Tokenizer

TRAINED = byte_pairs(patterns.GPT2)
MODEL = json.loads(TRAINED.to_str())["model"]
SIZE = len(MODEL["vocab"])
MERGES = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in MODEL["merges"])
MARKS = {"<eom>": SIZE + 1, "<|Human|>": SIZE, "<|MOSS|>": SIZE + 2}


def load(path: Path, merges: str = MERGES, **files: Any) -> Tokenizer:
    named = {name.replace("__", "."): content for name, content in files.items()}
    return load_tokenizer(write(path, {"vocab.json": MODEL["vocab"], "merges.txt": merges, **named}))


def test_ids_are_those_of_gpt2s_own_pre_tokenizer(tmp_path: Path) -> None:
    reference = byte_pairs(patterns.GPT2)
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = load(tmp_path)
    for text in [*SENTENCES, *TEXTS]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert load(tmp_path, MERGES.replace("\n", "\r\n")).encode(SENTENCES[0]) == tokenizer.encode(SENTENCES[0])


def test_qwen2_cuts_in_its_own_way(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, tokenizer_config__json={"tokenizer_class": "Qwen2Tokenizer"})
    reference = byte_pairs(patterns.QWEN2)
    words = reference.pre_tokenizer.pre_tokenize_str("x 2024\n\n  don't")
    assert [word for word, _ in words] == ["x", "Ġ", "2", "0", "2", "4", "ĊĊ", "Ġ", "Ġdon", "'t"]
    assert tokenizer.encode("e\u0301") == load(tmp_path / "gpt2").encode("\u00e9")


TEXT = "Hi 你好, x=12345!\n  don't ③"
WORDS = {
    "gpt-2": ["Hi", " 你好", ",", " x", "=", "12345", "!", "\n ", " don", "'t", " ③"],
    "smollm": ["Hi", " 你好", ",", " x", "=", *"12345", "!", "\n ", " don", "'t", " ", "③"],
    "llama-bpe": ["Hi", " 你好", ",", " x", "=", "123", "45", "!\n", " ", " don", "'t", " ", "③"],
    "qwen2": ["Hi", " 你好", ",", " x", "=", *"12345", "!\n", " ", " don", "'t", " ", "③"],
    "chatglm-bpe": ["Hi", " 你好", ",", " x", "=", "123", "45", "!\n", " ", " don", "'t", " ", "③"],
    "deepseek-llm": ["Hi", " ", "你好", ",", " x", "=", *"12345", "!", "\n", " ", " don", "'", "t", " ", "③"],
    "deepseek-coder": [
        "Hi",
        " ",
        "你好",
        ",",
        " x",
        "=",
        *"12345",
        "!",
        "\n",
        " ",
        " don",
        "'",
        "t",
        " ",
        "③",
    ],
    "deepseek-v3": ["Hi", " ", "你好", ",", " x", "=", "123", "45", "!\n", " ", " don", "'t", " ", "③"],
    "falcon": ["Hi", " 你好", ",", " x", "=", "123", "45", "!", "\n ", " don", "'", "t", " ③"],
    "bloom": ["Hi", " 你好", ",", " x=12345", "!\n ", " don't", " ③"],
    "default": ["Hi", " 你好", ",", " x", "=", "123", "45", "!", "\n ", " don", "'", "t", " ", "③"],
}


@pytest.mark.parametrize("name", WORDS)
def test_words_of_named_patterns(name: str) -> None:
    alphabet = byte_level_alphabet()
    words = byte_level_splits(patterns.BY_NAME[name]).pre_tokenize_str(TEXT)
    assert [bytes(alphabet[c] for c in word).decode() for word, _ in words] == WORDS[name]


def test_added_tokens(tmp_path: Path) -> None:
    config = {"eos_token": "<eom>", "additional_special_tokens": ["<|Human|>"]}
    tokenizer = load(tmp_path, added_tokens__json=MARKS, tokenizer_config__json=config)
    ids = tokenizer.encode("<|Human|>: hi<eom>\n<|MOSS|>:")
    assert (ids[0], SIZE + 1 in ids, ids[-2]) == (SIZE, True, SIZE + 2)
    assert tokenizer.eos_token_id == SIZE + 1
    assert tokenizer.special_ids == {SIZE, SIZE + 1}
    assert tokenizer.decode(ids) == ": hi\n<|MOSS|>:"
    assert tokenizer.vocab_size == SIZE + 3


def test_broken_files(tmp_path: Path) -> None:
    for merges, files, message in (
        ("a b c\n", {}, "merges.txt: line 1: two tokens expected, found 'a b c'"),
        ("#version: 0.2\nqq zz\n", {}, "merges.txt: does not go with vocab.json"),
        (
            MERGES,
            {"added_tokens__json": {"<a>": SIZE + 7}},
            f"added token '<a>': id {SIZE}, the next free one",
        ),
        (MERGES, {"added_tokens__json": {"<a>": "x"}}, "'<a>': a token id expected, found 'x'"),
    ):
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path, merges, **files)
        assert message in str(caught.value)
