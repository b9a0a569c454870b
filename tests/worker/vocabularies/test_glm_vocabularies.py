"""ChatGLM's tokenizers: commands that no text gives, and ChatGLM-6B's rules for white space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from small_vocabularies import SENTENCES, sentencepiece_model, write

from flm.worker.errors import CheckpointError
from flm.worker.vocabularies.files import load_tokenizer
from flm.worker.vocabularies.tokenizer import IncrementalDecoder, Tokenizer

MODEL = sentencepiece_model(add_dummy_prefix=True)
SIZE = 420
ICE = sentencepiece_model("<n>", add_dummy_prefix=True, byte_fallback=False, vocab_size=164)
ICE_SIZE = 164


def load(path: Path, name: str, model: bytes, **config: Any) -> Tokenizer:
    config = {"tokenizer_class": "ChatGLMTokenizer", **config}
    return load_tokenizer(write(path, {name: model, "tokenizer_config.json": config}))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = IncrementalDecoder(tokenizer, skip_special=False)
    return "".join([*[decoder.push(i) for i in ids], decoder.flush()])


def test_chatglm2_and_3(tmp_path: Path) -> None:
    tokenizer, own = load(tmp_path, "tokenizer.model", MODEL), SentencePieceProcessor(model_proto=MODEL)
    # 64789 to 64797 behind the 64789 pieces of the published model
    names = "[MASK] [gMASK] [sMASK] sop eop <|system|> <|user|> <|assistant|> <|observation|>"
    assert [tokenizer.token_id(name) for name in names.split()] == [SIZE + i for i in range(9)]
    gmask, sop, user = SIZE + 1, SIZE + 3, SIZE + 6
    for text in SENTENCES:
        assert tokenizer.encode(text) == [gmask, sop, *own.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("sop", False) == own.encode("sop")  # a word like any other
    assert tokenizer.encode("[gMASK]sop<|user|>\nhi", False) == [gmask, sop, user, *own.encode("\nhi")]
    assert tokenizer.encode("<|user|>", False, parse_special=False) == own.encode("<|user|>")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 2)
    assert tokenizer.vocab_size == SIZE + 9


def by_the_book(text: str) -> list[int]:
    """ChatGLM-6B's rules, taken literally: a model with the white space as pieces of its own, longest runs first."""
    model = SentencePieceProcessor(model_proto=ICE)
    first = ICE_SIZE + 8  # behind the special tokens
    marks = [("\t", first)] + [(" " * n, first + n - 1) for n in range(80, 1, -1)]
    ids: list[int] = []
    pieces: list[str | int] = [text.replace("\n", "<n>")]
    for spelt, i in marks:
        cut: list[str | int] = []
        for piece in pieces:
            if isinstance(piece, int):
                cut.append(piece)
                continue
            for number, run in enumerate(piece.split(spelt)):
                cut += ([i] if number else []) + ([run] if run else [])
        pieces = cut
    bare = sentencepiece_model_pb2.ModelProto.FromString(ICE)
    bare.normalizer_spec.add_dummy_prefix = False
    later = SentencePieceProcessor(model_proto=bare.SerializeToString())
    for number, piece in enumerate(pieces):
        if isinstance(piece, int):
            ids += ([model.piece_to_id("\u2581")] if number == 0 else []) + [piece]
        else:
            ids += (model if number == 0 else later).encode(piece)
    return ids


def test_chatglm_6b(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, "ice_text.model", ICE, num_image_tokens=0)
    mask, gmask, sop, eop = (tokenizer.token_id(name) for name in ("[MASK]", "[gMASK]", "<sop>", "<eop>"))
    # 130000, 130001, 130004 and 130005 behind the 130000 pieces of the published model
    assert [mask, gmask, sop, eop] == [ICE_SIZE + i for i in (0, 1, 4, 5)]
    assert tokenizer.vocab_size == ICE_SIZE + 8 + 80 + 256
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (sop, eop)
    for text in (
        "the cat\nsat on\n\nthe mat",
        "def f(x):\n    return x\n\n",
        "a\td" + " " * 7 + "c",
        " " * 163 + "dog",
    ):
        ids = tokenizer.encode(text, add_special=False)
        assert ids == by_the_book(text)
        assert tokenizer.encode(text) == [*ids, gmask, sop]
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text
    assert tokenizer.encode("the [MASK] sat")[-1] == sop
    assert gmask not in tokenizer.encode("the [MASK] sat")
    # a character without a piece is spelt in bytes
    ids = tokenizer.encode("世", False)
    assert [tokenizer.token(i) for i in ids[-3:]] == ["<0xE4>", "<0xB8>", "<0x96>"]
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == "世"
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


def completed(model: bytes) -> bytes:
    """The file as later revisions publish it: with the special pieces, the white space and the bytes in it."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    special = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    spaces = ["<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))]
    kinds = [(special, 3), (spaces, 4), ([f"<0x{b:02X}>" for b in range(256)], 6)]
    for names, kind in kinds:
        for name in names:
            proto.pieces.add(piece=name, score=0.0, type=kind)
    proto.trainer_spec.byte_fallback = True
    return bytes(proto.SerializeToString())


def test_chatglm_6b_with_everything_in_its_file(tmp_path: Path) -> None:
    bare = load(tmp_path / "bare", "ice_text.model", ICE, num_image_tokens=0)
    whole = load(tmp_path / "whole", "ice_text.model", completed(ICE), num_image_tokens=0)
    assert (whole.vocab_size, whole.special_ids) == (bare.vocab_size, bare.special_ids)
    assert (whole.bos_token_id, whole.eos_token_id) == (bare.bos_token_id, bare.eos_token_id)
    for text in [*SENTENCES, "a\td   c  [MASK]<sop>", "世[gMASK]\n"]:
        assert whole.encode(text) == bare.encode(text)
        assert whole.decode(whole.encode(text), False) == bare.decode(bare.encode(text), False)
    broken = completed(ICE).replace(b"[gMASK]", b"[hMASK]")
    with pytest.raises(CheckpointError, match=r"a piece '\[gMASK\]' expected"):
        load(tmp_path / "broken", "ice_text.model", broken, num_image_tokens=0)


def test_the_first_revisions_of_chatglm_6b(tmp_path: Path) -> None:
    """20,000 ids of images stand in front of those of the text."""
    plain = load(tmp_path / "new", "ice_text.model", ICE, num_image_tokens=0)
    write(tmp_path / "old", {"config.json": {"bos_token_id": 150004}})
    for shifted in (
        load(tmp_path / "old", "ice_text.model", ICE),
        load(tmp_path / "stated", "ice_text.model", ICE, num_image_tokens=20000),
    ):
        text = "the cat\nsat[MASK]"
        ids = shifted.encode(text)
        assert ids == [i + 20000 for i in plain.encode(text)]
        assert shifted.decode(ids, False) == plain.decode(plain.encode(text), False)
        assert shifted.special_ids == {i + 20000 for i in plain.special_ids}
        assert shifted.vocab_size == plain.vocab_size + 20000
        assert shifted.token(5) is None
        assert shifted.decode([5]) == ""


@pytest.mark.parametrize("name", ["tokenizer.model", "ice_text.model"])
def test_broken_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{name}: not a SentencePiece model"):
        load(tmp_path, name, b"\xff\xff")
