"""Tokenizers: round trips, streams in whole characters, both kinds of GGUF vocabulary, and broken files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gguf_vocabularies import SPACE, TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from flm.worker.errors import CheckpointError, InvalidRequest
from flm.worker.vocabularies.base import AddedToken, SplitVocabulary
from flm.worker.vocabularies.files import checked, load_tokenizer
from flm.worker.vocabularies.library import LibraryVocabulary
from flm.worker.vocabularies.tokenizer import IncrementalDecoder, Tokenizer


def streamed(
    tokenizer: Tokenizer, ids: list[int], skip_special: bool = True, after: list[int] | None = None
) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, skip_special, after or [])
    return [*[decoder.push(i) for i in ids], decoder.flush()]


# ------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(smollm2: Tokenizer, sentencepiece: Tokenizer, text: str) -> None:
    for tokenizer in (smollm2, sentencepiece):
        ids = tokenizer.encode(text, add_special=False)
        assert tokenizer.decode(ids, skip_special=False) == text
        assert "".join(streamed(tokenizer, ids, skip_special=False)) == text


# SmolLM2 has no tokens for some control characters and for the bytes F1 and F2, with which planes 4 to 11 begin;
# to SentencePiece its own space is a space
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters=SPACE).filter(
    lambda c: not 0x40000 <= ord(c) < 0xC0000
)


@given(st.text(CHARACTERS, max_size=40))
@settings(max_examples=200, deadline=None)
def test_round_trip_of_any_text(smollm2: Tokenizer, sentencepiece: Tokenizer, text: str) -> None:
    for tokenizer in (smollm2, sentencepiece):
        ids = tokenizer.encode(text, add_special=False)
        assert tokenizer.decode(ids, skip_special=False) == text


@given(st.lists(st.integers(0, 49151), max_size=30))
@settings(max_examples=200, deadline=None)
def test_decode_is_the_librarys_for_any_tokens(smollm2: Tokenizer, ids: list[int]) -> None:
    for skip in (True, False):
        want = smollm2.vocabulary.inner.decode(ids, skip_special_tokens=skip)
        assert smollm2.decode(ids, skip) == want
        assert "".join(streamed(smollm2, ids, skip)) == want


@given(st.lists(st.integers(0, 350), max_size=30))
@settings(max_examples=200, deadline=None)
def test_streams_of_sentencepiece_are_what_decode_gives(sentencepiece: Tokenizer, ids: list[int]) -> None:
    assert "".join(streamed(sentencepiece, ids)) == sentencepiece.decode(ids)


# ------------------------------------------------------------------------------------------------ streams


def test_no_half_character_is_ever_shown(smollm2: Tokenizer, sentencepiece: Tokenizer) -> None:
    text = "été 日本 👩‍👩‍👧 ok"
    for tokenizer in (smollm2, sentencepiece):
        parts = streamed(tokenizer, tokenizer.encode(text, add_special=False))
        assert "".join(parts) == text
        assert "\ufffd" not in "".join(parts)
        assert "" in parts  # something had to wait
        assert "👩" in parts


def test_a_stream_that_ends_within_a_character(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("ok 🎂", add_special=False)
    assert len(ids) >= 3
    assert streamed(smollm2, ids[:-1])[-1] == "\ufffd"
    assert "".join(streamed(smollm2, ids[:-1])) == smollm2.decode(ids[:-1])
    # a broken character followed by a whole one
    assert "".join(streamed(smollm2, [*ids[:-1], *smollm2.encode("a")])) == "ok \ufffda"


def test_a_character_that_began_in_the_prompt(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("🎂!", add_special=False)
    assert "".join(streamed(smollm2, ids[1:], after=ids[:1])) == "🎂!"


def test_a_leading_space_is_kept_where_a_text_goes_on(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("the cat sat", add_special=False)
    assert "".join(streamed(sentencepiece, ids)) == "the cat sat"
    assert "".join(streamed(sentencepiece, ids[1:], after=ids[:1])) == " cat sat"


def test_special_tokens_are_left_out_or_shown(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("<|im_start|>user\nhi<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert smollm2.decode(ids) == "user\nhi"
    assert "".join(streamed(smollm2, ids)) == "user\nhi"
    assert smollm2.decode(ids, skip_special=False) == "<|im_start|>user\nhi<|im_end|>"
    assert {1, 2} <= smollm2.special_ids


def test_unknown_and_negative_ids(smollm2: Tokenizer) -> None:
    assert smollm2.decode([10**6, *smollm2.encode("x")]) == "x"
    assert streamed(smollm2, [10**6]) == ["", ""]
    with pytest.raises(InvalidRequest, match="ids: token ids >= 0 expected, got -1"):
        smollm2.decode([3, -1])


def test_lone_surrogates_are_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="prompt: valid Unicode text expected"):
        smollm2.encode("a\ud800b")


# -------------------------------------------------------------------------------------------- directories


@pytest.fixture
def directory(smollm2: Tokenizer, tmp_path: Path) -> Path:
    smollm2.vocabulary.inner.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": "T"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_directory(directory: Path, smollm2: Tokenizer) -> None:
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template) == (1, 2, "T")
    for text in TEXTS:
        assert tokenizer.encode(text) == smollm2.encode(text)
        assert "".join(streamed(tokenizer, tokenizer.encode(text), False)) == text


def test_where_a_directory_keeps_its_chat_template(directory: Path) -> None:
    config = directory / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "D"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(directory).chat_template == "D"
    (directory / "chat_template.jinja").write_text("J")
    assert load_tokenizer(directory).chat_template == "J"
    (directory / "chat_template.jinja").unlink()
    config.unlink()
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token_id) == (None, None, None)


def test_broken_directories(directory: Path) -> None:
    for file, content, message in (
        ("tokenizer_config.json", '{"bos_token": 5}', "bos_token: a token's text expected, found 5"),
        (
            "tokenizer_config.json",
            '{"chat_template": 5}',
            "chat_template: a template's text expected, found int",
        ),
        ("tokenizer_config.json", "[", "is not JSON"),
        ("tokenizer.json", "{}", "not a tokenizer that can be read"),
        ("tokenizer.json", "", "not a tokenizer that can be read"),
    ):
        broken = Path(shutil.copytree(directory, directory / f"broken-{len(list(directory.iterdir()))}"))
        (broken / file).write_text(content)
        with pytest.raises(CheckpointError) as caught:
            load_tokenizer(broken)
        assert message in str(caught.value)
        assert caught.value.file == str(broken / file)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"expected tokenizer\.json, tokenizer\.model, .* in this directory"
    ):
        load_tokenizer(directory)


def test_a_decoder_that_is_not_plain_bytes_is_streamed_through_windows() -> None:
    vocab = {"[UNK]": 0, "un": 1, "##believ": 2, "##able": 3, "story": 4, ",": 5}
    inner = RustTokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    tokenizer = Tokenizer(LibraryVocabulary(inner))
    assert tokenizer.pieces is None
    ids = tokenizer.encode("unbelievable story, story")
    assert streamed(tokenizer, ids) == ["un", "believ", "able", " story", ",", " story", ""]


def test_tokens_without_a_row_in_the_embedding(tmp_path: Path) -> None:
    vocab = {"▁": 0, "a": 1, "b": 2, "▁<PRE>": 3, "▁<EOT><EOT>": 4}
    inner = RustTokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.add_special_tokens(["[PAD]"])
    tokenizer = Tokenizer(LibraryVocabulary(inner))
    assert checked(tokenizer, 6, "m").encode("[PAD]") == [5]
    spare = checked(tokenizer, 3, "m")  # Code Llama's marks and padding: its 34B has no rows for them either
    assert (spare.vocab_size, spare.encode("ab")) == (3, [1, 2])
    with pytest.raises(InvalidRequest, match=r"prompt: the model has no row for the token '\[PAD\]'"):
        spare.encode("a[PAD]")
    with pytest.raises(
        CheckpointError, match=r"m: its tokenizer has 6 tokens and its embedding 2 rows; .* is 'b'"
    ):
        checked(tokenizer, 2, "m")
    assert checked(tokenizer, 8, "m").vocab_size == 6
    with pytest.raises(CheckpointError, match=r"6 tokens and its embedding 9 rows; .* is another model's"):
        checked(tokenizer, 9, "m")


def test_an_id_that_no_vocabulary_reaches_is_refused_and_not_walked_to() -> None:
    tokenizer = Tokenizer(SplitVocabulary(["a"], {"b": AddedToken(2**40)}))  # type: ignore[arg-type]
    with pytest.raises(
        CheckpointError, match=rf"m: its tokenizer has ids up to {2**40}; below 16777216 expected"
    ):
        checked(tokenizer, 2, "m")
