"""tokenizer.model: SentencePiece's own ids, with special tokens in between and added tokens behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_vocabularies import TEXTS
from sentencepiece import SentencePieceProcessor
from small_vocabularies import SENTENCES, sentencepiece_model, write

from flm.worker.errors import CheckpointError
from flm.worker.vocabularies.files import load_tokenizer
from flm.worker.vocabularies.tokenizer import IncrementalDecoder, Tokenizer

MARKS = {  # as tokenizer_config.json of Yi-34B-Chat lists them
    "420": {"content": "<|im_start|>", "special": True},
    "421": {"content": "<|im_end|>", "special": True},
    "422": {"content": "<tool>", "special": False},
}
PLAIN = sentencepiece_model()
PREFIXED = sentencepiece_model(add_dummy_prefix=True)
NORMALISED = sentencepiece_model(
    add_dummy_prefix=True, remove_extra_whitespaces=True, normalization_rule_name="nmt_nfkc"
)
UNIGRAM = sentencepiece_model(model_type="unigram", vocab_size=350, add_dummy_prefix=True)
OWN = [text for text in [*SENTENCES, *TEXTS] if "<" not in text]


def load(path: Path, model: bytes, **config: Any) -> Tokenizer:
    return load_tokenizer(write(path, {"tokenizer.model": model, "tokenizer_config.json": config}))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = IncrementalDecoder(tokenizer, skip_special=False)
    return "".join([*[decoder.push(i) for i in ids], decoder.flush()])


@pytest.mark.parametrize(
    "model", [PLAIN, PREFIXED, NORMALISED, UNIGRAM], ids=["plain", "prefix", "nfkc", "unigram"]
)
def test_ids_and_texts_are_the_librarys_own(model: bytes, tmp_path: Path) -> None:
    tokenizer, own = load(tmp_path, model), SentencePieceProcessor(model_proto=model)
    assert tokenizer.vocab_size == own.vocab_size()
    for text in OWN:
        ids = own.encode(text)
        assert tokenizer.encode(text, add_special=False) == ids
        assert tokenizer.encode(text) == [1, *ids]
        if 0 not in ids:  # for an unknown token SentencePiece shows a mark of its own
            assert tokenizer.decode(ids) == streamed(tokenizer, ids) == own.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text: str, tmp_path: Path) -> None:
    for model in (PLAIN, PREFIXED):
        tokenizer = load(tmp_path, model, added_tokens_decoder=MARKS)
        ids = tokenizer.encode(text, add_special=False)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids, skip_special=False)
        if "<" not in text or model is PLAIN:
            assert tokenizer.decode(ids, skip_special=False) == text


def test_ends(tmp_path: Path) -> None:
    own = SentencePieceProcessor(model_proto=PLAIN)
    ids = own.encode("the cat")
    tokenizer = load(tmp_path, PLAIN)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<s>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 2)
    assert tokenizer.encode("the cat") == [1, *ids]
    assert load(tmp_path, PLAIN, add_bos_token=False, add_eos_token=True).encode("the cat") == [*ids, 2]
    chat = load(tmp_path, PLAIN, added_tokens_decoder=MARKS, eos_token="<|im_end|>", bos_token=None)
    assert (chat.eos_token_id, chat.bos_token_id) == (421, 1)


def test_added_tokens_are_found_first(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, PLAIN, added_tokens_decoder=MARKS)
    own = SentencePieceProcessor(model_proto=PLAIN)
    text = "<|im_start|>user\nthe cat<|im_end|>\n<tool></s>"
    ids = [420, *own.encode("user\nthe cat"), 421, *own.encode("\n"), 422, 2]
    assert tokenizer.encode(text, add_special=False) == ids
    assert tokenizer.vocab_size == 423
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode(ids) == "user\nthe cat\n<tool>"
    # <tool> is no special token: it is found in any text
    plain = [*own.encode("<|im_start|>user\nthe cat<|im_end|>\n"), 422, *own.encode("</s>")]
    assert tokenizer.encode(text, add_special=False, parse_special=False) == plain


def test_a_space_in_front_of_every_run_or_of_the_first_one(tmp_path: Path) -> None:
    own = SentencePieceProcessor(model_proto=PREFIXED)
    bare = SentencePieceProcessor(model_proto=PLAIN)
    assert own.encode("the cat")[0] != bare.encode("the cat")[0]
    tokenizer = load(tmp_path, PREFIXED)
    text = "the cat</s>the dog"
    assert tokenizer.encode(text, False) == [*own.encode("the cat"), 2, *own.encode("the dog")]
    assert tokenizer.decode(tokenizer.encode(text, False), False) == "the cat</s> the dog"
    modern = load(tmp_path, PREFIXED, legacy=False)
    assert modern.encode(text, False)[: len(own.encode("the cat"))] == own.encode("the cat")
    assert modern.decode(modern.encode(text, False), False) == text
    assert modern.decode(modern.encode("</s>the dog", False), False) == "</s>the dog"


def test_marks_that_are_pieces_of_the_model(tmp_path: Path) -> None:
    """InternLM: <eoh> and <eoa> are user-defined pieces. InternLM2: a piece's id is taken by an added token."""
    model = sentencepiece_model("<eoh>", "<eoa>", "[UNUSED_TOKEN_1]", "<h1>")
    own = SentencePieceProcessor(model_proto=model)
    eoh, unused, h1 = (own.piece_to_id(piece) for piece in ("<eoh>", "[UNUSED_TOKEN_1]", "<h1>"))
    decoder = {str(unused): {"content": "<|im_end|>", "special": True}}
    tokenizer = load(tmp_path, model, added_tokens_decoder=decoder)
    assert tokenizer.encode("a<eoh><|im_end|><h1>", False)[-3:] == [eoh, unused, h1]
    assert {eoh, unused} <= tokenizer.special_ids
    assert h1 not in tokenizer.special_ids
    assert unused not in tokenizer.encode("[UNUSED_TOKEN_1]", False)
    for text in ("a<eoh>", "<|im_end|>"):
        ids = tokenizer.encode(text, False, parse_special=False)
        assert not {eoh, unused} & set(ids)
        assert tokenizer.decode(ids) == text


def test_broken_files(tmp_path: Path) -> None:
    wrong = {"7": {"content": "the", "special": True}}
    ids = SentencePieceProcessor(model_proto=PLAIN)
    for model, config, message in (
        (b"\xff\xff\xff", {}, "tokenizer.model: not a SentencePiece model"),
        (b"", {}, "tokenizer.model: not a SentencePiece model"),
        (PLAIN[: len(PLAIN) // 2], {}, "tokenizer.model: not a SentencePiece model"),
        (PLAIN, {"added_tokens_decoder": wrong}, f"added token 'the': id {ids.piece_to_id('the')} of"),
        (PLAIN, {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder['x']: a token with its content"),
    ):
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path, model, **config)
        assert message in str(caught.value)
