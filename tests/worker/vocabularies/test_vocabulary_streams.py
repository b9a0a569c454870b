"""Every kind of tokenizer: texts come back, streams of any tokens are what decode() gives, no token is longer than stated."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vocabularies import byte_pairs, rank_file, sentencepiece_model, write

from flm.worker.vocabularies import patterns
from flm.worker.vocabularies.files import load_tokenizer
from flm.worker.vocabularies.tokenizer import IncrementalDecoder, Tokenizer

RANKS = rank_file(byte_pairs(patterns.QWEN2))
CHATGLM = {"tokenizer_config.json": {"tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 7}}
KINDS = {
    "sentencepiece": {"tokenizer.model": sentencepiece_model()},
    "prefixed": {"tokenizer.model": sentencepiece_model(add_dummy_prefix=True)},
    "chatglm2": {"tokenizer.model": sentencepiece_model(add_dummy_prefix=True), **CHATGLM},
    "ice_text": {
        "ice_text.model": sentencepiece_model("<n>", byte_fallback=False, vocab_size=164),
        **CHATGLM,
    },
    "qwen": {"qwen.tiktoken": RANKS},
    "glm4": {"tokenizer.model": RANKS},
}
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2581"), max_size=40)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("kind")
    return load_tokenizer(write(directory, KINDS[request.param]))


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    decoder = IncrementalDecoder(tokenizer, skip)
    return "".join([*[decoder.push(i) for i in ids], decoder.flush()])


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_streams_of_any_tokens(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    for skip in (True, False):
        assert streamed(tokenizer, ids, skip) == tokenizer.decode(ids, skip)
    assert tokenizer.pieces is not None
    assert all(len(tokenizer.pieces[i]) <= tokenizer.longest_token for i in ids)


@given(text=TEXT)
@settings(max_examples=40, deadline=None)
def test_texts_come_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode([]) == ""
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    # Qwen brings texts into a normal form first
    assert tokenizer.decode(ids, skip_special=False) in (text, unicodedata.normalize("NFC", text))


@given(text=TEXT.filter(bool), data=st.data())
@settings(max_examples=15, deadline=None)
def test_streams_that_go_on_elsewhere(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    """Cut anywhere, also within a character: what came before and what comes after are the whole, and none of it is
    half a character."""
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    whole = tokenizer.decode(ids, skip_special=False)
    cut = data.draw(st.integers(0, len(ids)))
    before, after = (
        IncrementalDecoder(tokenizer, False),
        IncrementalDecoder(tokenizer, False, after=ids[:cut]),
    )
    said = "".join(before.push(i) for i in ids[:cut])
    rest = [*(after.push(i) for i in ids[cut:]), after.flush()]
    assert ("\ufffd" in "".join([said, *rest])) == ("\ufffd" in text)
    if said:  # else the space in front of a whole text may still be to come
        assert "".join([said, *rest]) == whole
