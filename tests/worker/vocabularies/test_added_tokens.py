"""What stands beside a vocabulary: tokens that only tokenizer_config.json knows, or knows as special; ends of a text;
marks of turns that are pieces like others to the library; GGUF files of several unknown tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from gguf_vocabularies import byte_level_gguf, sentencepiece_gguf
from sentencepiece import SentencePieceProcessor
from small_vocabularies import byte_pairs, sentencepiece_model, write
from tokenizers import AddedToken, decoders, processors
from tokenizers import Tokenizer as RustTokenizer

from flm.worker.errors import CheckpointError
from flm.worker.vocabularies import patterns
from flm.worker.vocabularies.files import load_tokenizer
from flm.worker.vocabularies.tokenizer import IncrementalDecoder, Tokenizer

TRAINED = byte_pairs(patterns.LLAMA3)
TRAINED.decoder = decoders.ByteLevel()
SIZE = TRAINED.get_vocab_size()
_STATE = json.loads(TRAINED.to_str())  # DeepSeek-Coder's vocabulary has no bytes that no text has, as FC
FC = _STATE["model"]["vocab"].pop("ü")
_STATE["model"]["vocab"]["spare"] = FC
TRAINED = RustTokenizer.from_str(json.dumps(_STATE))
TRAINED.add_special_tokens(["<s>"])
TRAINED.add_tokens([AddedToken("<|EOT|>", normalized=False), AddedToken("ü", normalized=False)])
BOS, EOT, UMLAUT = SIZE, SIZE + 1, SIZE + 2
BARE = TRAINED.to_str()


def load(path: Path, inner: str = BARE, **config: Any) -> Tokenizer:
    return load_tokenizer(write(path, {"tokenizer.json": inner, "tokenizer_config.json": config}))


def test_an_added_token_reads_as_it_is_spelt(tmp_path: Path) -> None:
    """DeepSeek-Coder has "ü" among its added tokens; in GPT-2's alphabet that is the byte FC, no character."""
    tokenizer = load(tmp_path)
    ids = tokenizer.encode("Grüße", False)
    assert UMLAUT in ids
    decoder = IncrementalDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) == tokenizer.decode(ids) == "Grüße"


def test_what_tokenizer_config_calls_special_is(tmp_path: Path) -> None:
    assert load(tmp_path / "bare").special_ids == {BOS}
    more = {str(SIZE + 3): {"content": "<|pad|>", "special": True}, str(SIZE + 4): {"content": "<t>"}}
    for given in (
        {"eos_token": "<|EOT|>"},
        {"added_tokens_decoder": {str(EOT): {"content": "<|EOT|>", "special": True}}},
    ):
        tokenizer = load(tmp_path / "named", **given, pad_token="!", unk_token="nowhere")
        assert tokenizer.special_ids == {BOS, EOT}
        assert tokenizer.decode(tokenizer.encode("hi!<|EOT|>", False)) == "hi!"
        assert EOT not in tokenizer.encode("hi<|EOT|>", False, parse_special=False)
    tokenizer = load(tmp_path / "more", added_tokens_decoder=more, additional_special_tokens=["at"])
    assert tokenizer.encode("<|pad|><t>", False) == [SIZE + 3, SIZE + 4]
    assert (tokenizer.vocab_size, tokenizer.special_ids) == (
        SIZE + 5,
        {BOS, SIZE + 3, tokenizer.token_id("at")},
    )
    with pytest.raises(
        CheckpointError, match=f"added token '<x>': id {SIZE + 3}, the next free one, expected"
    ):
        load(tmp_path / "gap", added_tokens_decoder={str(SIZE + 9): {"content": "<x>"}})


def test_ends_that_tokenizer_config_states(tmp_path: Path) -> None:
    ended = RustTokenizer.from_str(BARE)
    ended.post_processor = processors.TemplateProcessing(
        single="<s> $A <|EOT|>", special_tokens=[("<s>", BOS), ("<|EOT|>", EOT)]
    )
    names = {"bos_token": "<s>", "eos_token": "<|EOT|>"}
    plain = load(tmp_path / "plain").encode("the")
    llama = {"tokenizer_class": "LlamaTokenizerFast", **names}
    for inner, config, bos, eos in (
        (BARE, names, [], []),
        (BARE, {"add_bos_token": True, **names}, [BOS], []),
        (BARE, {"add_bos_token": True}, [], []),  # none is named
        (BARE, llama, [BOS], []),
        (BARE, {"add_bos_token": False, **llama}, [], []),
        (ended.to_str(), names, [BOS], [EOT]),
        (ended.to_str(), {"add_bos_token": None, **llama}, [BOS], [EOT]),
        (ended.to_str(), {"add_eos_token": False, **names}, [], []),
        (ended.to_str(), {"add_bos_token": False, "add_eos_token": True, **names}, [], [EOT]),
    ):
        assert load(tmp_path / "given", inner, **config).encode("the") == [*bos, *plain, *eos]


def test_a_word_of_the_vocabulary_that_ends_texts(tmp_path: Path) -> None:
    """GPT-2's <|endoftext|> is in vocab.json like any other."""
    model = json.loads(BARE)["model"]
    files = {
        "vocab.json": model["vocab"] | {"<|endoftext|>": SIZE},
        "merges.txt": "\n".join(map(" ".join, model["merges"])),
    }
    path = write(tmp_path, {**files, "tokenizer_config.json": {"eos_token": "<|endoftext|>"}})
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("<|endoftext|>")[-1] == tokenizer.eos_token_id == SIZE
    assert tokenizer.special_ids == {SIZE}


@pytest.mark.parametrize("prefix", [True, False])
def test_marks_of_turns_that_are_pieces(prefix: bool, tmp_path: Path) -> None:
    """MiniCPM's and Yi's: SentencePiece finds them, so no space comes in behind one; messages cannot spell them."""
    model = sentencepiece_model("<用户>", "<AI>", "<|im_end|>", "<|tab|>", add_dummy_prefix=prefix)
    own = SentencePieceProcessor(model_proto=model)
    user, ai, end, tab = (own.piece_to_id(mark) for mark in ("<用户>", "<AI>", "<|im_end|>", "<|tab|>"))
    tokenizer = load_tokenizer(write(tmp_path / "plain", {"tokenizer.model": model}))
    for text in ("<用户>the cat<AI>", "the <|im_end|> <|tab|>cat"):
        assert tokenizer.encode(text, False) == own.encode(text)
        ids = tokenizer.encode(text, False, parse_special=False)
        assert not {user, ai, end} & set(ids)
        assert tokenizer.decode(ids) == text
    assert {user, ai, end} <= tokenizer.special_ids
    assert tab not in tokenizer.special_ids
    named = write(
        tmp_path / "named", {"tokenizer.model": model, "tokenizer_config.json": {"eos_token": "<AI>"}}
    )
    assert load_tokenizer(named).encode("the<AI>the", False) == [*own.encode("the"), ai, *own.encode("the")]


def test_gguf_marks_and_unknown_tokens(tmp_path: Path) -> None:
    def end_of_turn(writer: GGUFWriter) -> None:
        _put(writer, "token_type", [1] * 263 + [4, 4])
        _put(writer, "tokens", [*_values(writer, "tokens")[:263], "<|EOT|>", "<t>"])

    tokenizer = load_tokenizer(byte_level_gguf(tmp_path / "bytes.gguf", "gpt-2", end_of_turn))
    assert tokenizer.encode("<|EOT|><t>", False) == [263, 264]
    assert tokenizer.special_ids == {263}

    def unknown(writer: GGUFWriter) -> None:
        kinds = _values(writer, "token_type")
        _put(writer, "token_type", [3, 2, 3, *kinds[3:-1], 2])
        writer.add_unk_token_id(0)

    usual = load_tokenizer(sentencepiece_gguf(tmp_path / "usual.gguf"))
    several = load_tokenizer(sentencepiece_gguf(tmp_path / "several.gguf", unknown))
    assert several.encode("the cat 世") == usual.encode("the cat 世")
    last = several.vocab_size - 1
    assert several.encode(f"a{several.token(last)}", False)[-1] == last


def _values(writer: GGUFWriter, name: str) -> list[Any]:
    return list(writer.kv_data[0][f"tokenizer.ggml.{name}"].value)


def _put(writer: GGUFWriter, name: str, values: list[Any]) -> None:
    del writer.kv_data[0][f"tokenizer.ggml.{name}"]
    writer.add_array(f"tokenizer.ggml.{name}", values)
