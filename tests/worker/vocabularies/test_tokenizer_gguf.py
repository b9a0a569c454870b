"""Tokenizers rebuilt from GGUF vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from gguf_vocabularies import CORPUS, SPACE, TEXTS, byte_level_gguf, sentencepiece_gguf, sentencepiece_vocab
from gguf_writer import write
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import pre_tokenizers

from flm.worker.errors import CheckpointError
from flm.worker.vocabularies.files import load_tokenizer
from flm.worker.vocabularies.tokenizer import Tokenizer


def joined_by_score(text: str) -> list[str]:
    """SentencePiece's rule, taken literally: join the neighbours with the best score until none is left."""
    tokens, scores, _ = sentencepiece_vocab()
    score = dict(zip(tokens, scores, strict=True))
    parts = list(SPACE + text.replace(" ", SPACE))
    while True:
        joins = [(-score[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in score]
        if not joins:
            break
        _, i = min(joins)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    out: list[str] = []
    for part in parts:
        out += [part] if part in score else [f"<0x{b:02X}>" for b in part.encode()]
    return out


def test_the_demo_tokenizer(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_token, smollm2.bos_token_id) == ("<|im_start|>", 1)
    assert (smollm2.eos_token, smollm2.eos_token_id) == ("<|im_end|>", 2)
    assert smollm2.chat_template is not None
    assert "messages" in smollm2.chat_template
    assert smollm2.encode("Hi") == smollm2.encode("Hi", add_special=False)
    # every digit stands alone, as the model was trained
    assert len(smollm2.encode("2024")) == 4


def test_smollm_splits_as_its_own_pre_tokenizer_does(smollm2: Tokenizer) -> None:
    """SmolLM2 was published with these two pre-tokenizers instead of the regular expressions of GGUF."""
    reference = RustTokenizer.from_str(smollm2.vocabulary.inner.to_str())
    digits = pre_tokenizers.Digits(individual_digits=True)
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in [*TEXTS, CORPUS, "x  12\n\n  34 ½ ²"]:
        assert smollm2.encode(text) == reference.encode(text).ids


def test_sentencepiece_joins_by_score(sentencepiece: Tokenizer) -> None:
    for text in [
        CORPUS.strip(),
        "the",
        "shells  sells",
        "a cab",
        "unknown: Ж 日",
        "the\nrain",
        "mainland sheath",
    ]:
        ids = sentencepiece.encode(text, add_special=False)
        assert [sentencepiece.token(i) for i in ids] == joined_by_score(text)


def test_sentencepiece_ends_and_special_texts(sentencepiece: Tokenizer, tmp_path: Path) -> None:
    ids = sentencepiece.encode("the cat")
    assert ids[0] == sentencepiece.bos_token_id == 1
    assert sentencepiece.decode(ids) == "the cat"
    assert sentencepiece.encode("the cat", add_special=False) == ids[1:]
    user = sentencepiece.vocab_size - 1
    assert user in sentencepiece.encode("a<|user|>b")
    assert user in sentencepiece.special_ids  # it begins a turn, whatever the file says of it
    assert user not in sentencepiece.encode("a<|user|>b", parse_special=False)

    def other(writer: GGUFWriter) -> None:
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(True)
        writer.add_add_space_prefix(False)

    tokenizer = load_tokenizer(sentencepiece_gguf(tmp_path / "m.gguf", other))
    ids = tokenizer.encode("the cat")
    assert (ids[0] != 1, ids[-1]) == (True, 2)
    assert tokenizer.token(ids[0])[0] == "t"
    assert tokenizer.decode(tokenizer.encode(" cat")) == " cat"


def test_sentencepiece_without_scores_joins_in_the_vocabularys_order(
    sentencepiece: Tokenizer, tmp_path: Path
) -> None:
    def no_scores(writer: GGUFWriter) -> None:
        del writer.kv_data[0]["tokenizer.ggml.scores"]

    tokenizer = load_tokenizer(sentencepiece_gguf(tmp_path / "m.gguf", no_scores))
    for text in (CORPUS.strip(), "shells  sells", "unknown: Ж 日"):
        assert tokenizer.encode(text) == sentencepiece.encode(text)


PRE_TOKENIZERS = {
    "smollm": ["1", "2", "3", "4"],
    "qwen2": ["1", "2", "3", "4"],
    "llama-bpe": ["123", "4"],
    "gpt-2": ["123", "4"],
    "default": ["123", "4"],
    None: ["123", "4"],
}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_pre_tokenizers(pre: str | None, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level_gguf(tmp_path / "m.gguf", pre))
    ids = tokenizer.encode("1234", add_special=False)
    assert [tokenizer.token(i) for i in ids] == PRE_TOKENIZERS[pre]
    for text in TEXTS:
        want = "\u00e9" if pre == "qwen2" else "e\u0301"  # NFC joins the accent
        expected = text.replace("e\u0301", want)
        assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == expected.replace("<s>", "")
    starts_with_bos = tokenizer.encode("x")[0] == tokenizer.bos_token_id
    assert starts_with_bos == (pre == "llama-bpe")


BROKEN_GGUF: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pre": (
        lambda p: byte_level_gguf(p, "tekken"),
        "pre: 'tekken' is not supported; supported: gpt-2, mpt",
    ),
    "merge of nothing": (
        lambda p: byte_level_gguf(p, "gpt-2", lambda w: _put(w, "merges", ["zz yy"])),
        "tokenizer cannot be built",
    ),
    "merge of one": (
        lambda p: byte_level_gguf(p, "gpt-2", lambda w: _put(w, "merges", ["zz"])),
        "tokenizer cannot be built",
    ),
    "types": (
        lambda p: byte_level_gguf(p, "gpt-2", lambda w: _put(w, "token_type", [1, 1])),
        "token_type: 265 entries expected, found 2",
    ),
    "scores": (
        lambda p: sentencepiece_gguf(p, lambda w: _put(w, "scores", [0.5])),
        "entries expected, found 1",
    ),
    "no types": (
        lambda p: byte_level_gguf(p, "smollm", lambda w: _put_text(w, "tokenizer.ggml.token_type", "none")),
        "token_type: 265 entries expected, found 'none'",
    ),
    "texts": (
        lambda p: byte_level_gguf(p, "smollm", lambda w: _put(w, "tokens", [1] * 265)),
        "tokenizer cannot be",
    ),
    "bos": (lambda p: sentencepiece_gguf(p, lambda w: _put_number(w, 10**6)), "bos_token_id: an id below"),
    "model": (
        lambda p: sentencepiece_gguf(p, lambda w: _put_text(w, "tokenizer.ggml.model", "bert")),
        "model: 'gpt2' or 'llama' expected, found 'bert'",
    ),
    "none": (lambda p: _without_tokens(p), "tokens is missing; a list of tokens expected"),
}


def _put(writer: GGUFWriter, name: str, values: list[Any]) -> None:
    del writer.kv_data[0][f"tokenizer.ggml.{name}"]
    writer.add_array(f"tokenizer.ggml.{name}", values)


def _put_text(writer: GGUFWriter, key: str, value: str) -> None:
    del writer.kv_data[0][key]
    writer.add_string(key, value)


def _put_number(writer: GGUFWriter, value: int) -> None:
    del writer.kv_data[0]["tokenizer.ggml.bos_token_id"]
    writer.add_bos_token_id(value)


def _without_tokens(path: Path) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    write(writer)
    return path


@pytest.mark.parametrize("case", BROKEN_GGUF)
def test_broken_gguf(case: str, tmp_path: Path) -> None:
    make, message = BROKEN_GGUF[case]
    path = make(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(path)
    assert message in str(caught.value)
    assert caught.value.file == str(path)
