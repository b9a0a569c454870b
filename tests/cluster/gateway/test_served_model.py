"""What the gateway says of a model, and reads of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fake_cluster import MODEL, byte_tokenizer
from gguf import GGUFWriter
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from flm.cluster.gateway.admission import admit
from flm.cluster.gateway.served_model import LoadedModel, ServedModel, Words, read_words, served_model
from flm.cluster.prompts.prompt_choice import PromptChoice
from flm.cluster.prompts.templates import ChatTemplate
from flm.cluster.settings.config import parse_config
from flm.cluster.state import ModelFacts
from flm.proto import flm_pb2
from flm.worker.errors import CheckpointError
from flm.worker.vocabularies.library import LibraryVocabulary
from flm.worker.vocabularies.tokenizer import Tokenizer


def loaded(tokenizer: Tokenizer, *eos: int, template: ChatTemplate | None = None) -> LoadedModel:
    words = Words(tokenizer, template or ChatTemplate(""))
    return LoadedModel(ServedModel("m", MODEL, 64, eos_token_ids=eos), words, lambda: None, "")


def test_a_tokens_text_keeps_its_space() -> None:
    inner = RustTokenizer(models.BPE(vocab={"▁the": 0, "a": 1, "<0xE4>": 2}, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model = loaded(Tokenizer(LibraryVocabulary(inner)))
    assert [model.token_text(i) for i in range(3)] == [" the", "a", "\ufffd"]
    assert model.tokenizer.decode([0]) == "the"


def test_ends_are_those_of_the_checkpoint(tokenizer: Tokenizer) -> None:
    assert list(loaded(tokenizer).info().eos_token_ids) == [256]  # it names none: the tokenizer's
    assert list(loaded(tokenizer, 2, 7).info().eos_token_ids) == [2, 7]


def test_what_ends_an_answer_besides_what_workers_know(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("", stop_ids=(2, 256), stop_strings=("Human:",))
    model = loaded(tokenizer, 2, template=template)
    assert list(model.info().eos_token_ids) == [2, 256]
    options = admit(flm_pb2.SamplingOptions(stop_token_ids=[9], stop=[b"x"]), 1, 64)
    chat, plain = model.with_ends(options, chat=True), model.with_ends(options, chat=False)
    assert chat.params.stop_token_ids == plain.params.stop_token_ids == (9, 256)  # the worker knows 2 itself
    assert (chat.stops, plain.stops) == (("x", "Human:"), ("x",))
    kept = admit(flm_pb2.SamplingOptions(ignore_eos=True), 1, 64)
    assert model.with_ends(kept, chat=True) == kept


def test_a_tokenizer_with_more_ids_than_the_model_has_rows(tokenizer: Tokenizer) -> None:
    wrong = r"llama2: its tokenizer has 257 tokens and its embedding 256 rows"
    with pytest.raises(CheckpointError, match=wrong):
        read_words(ServedModel("m", MODEL, 64, rows=256), lambda path: tokenizer)
    assert read_words(ServedModel("m", MODEL, 64, rows=300), lambda path: tokenizer).tokenizer.rows == 300


def test_what_the_yaml_and_the_plan_say_of_a_model() -> None:
    text = (
        "name: c\nmodels:\n  - {name: m, path: package:x, prompt_format: chatml, generation_config: none}\n"
    )
    (section,) = parse_config(text, "/c.yaml").models
    facts = ModelFacts(1, 64, "llama", "Q4_1", rows=96, eos_token_ids=(2,))
    assert served_model(section, facts) == ServedModel(
        "m", "package:x", 64, "llama", "Q4_1", 1, PromptChoice("chatml"), 96, (2,), generation_config=False
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that wants to be sampled in a way of its own."""
    for name in ("config.json", "generation_config.json"):
        shutil.copy(Path(MODEL) / name, tmp_path)
    own = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [2]}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    return tmp_path


def test_defaults_of_sampling_are_the_checkpoints(folder: Path, tokenizer: Tokenizer) -> None:
    spec = ServedModel("m", str(folder), 64)
    words = read_words(spec, lambda path: tokenizer)
    params = admit(flm_pb2.SamplingOptions(top_k=0), 1, 64, words.sampling).params
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 0, 0.95)
    assert (params.min_p, params.repetition_penalty) == (0.0, 1.0)  # neutral, for it does not say
    assert read_words(ServedModel("m", MODEL, 64), lambda path: tokenizer).sampling == {}
    none = ServedModel("m", str(folder), 64, generation_config=False)
    assert read_words(none, lambda path: tokenizer).sampling == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": "hot"}, "temperature: a number expected, found 'hot'"),
        ({"top_k": 2.5}, "top_k: a whole number expected, found 2.5"),
        ({"top_p": 0}, r"top_p: expected \(0.0, 1.0\], got 0"),
        ({"repetition_penalty": True}, "repetition_penalty: a number expected, found True"),
    ],
)
def test_defaults_out_of_range_are_named(
    folder: Path, tokenizer: Tokenizer, given: dict[str, object], said: str
) -> None:
    (folder / "generation_config.json").write_text(json.dumps(given))
    spec = ServedModel("m", str(folder), 64)
    with pytest.raises(CheckpointError, match=f"generation_config.json: {said}; `generation_config: none`"):
        read_words(spec, lambda path: tokenizer)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"temp": 0.5, "top_k": 20, "top_p": 0.75, "min_p": 0.25, "penalty_repeat": 1.5, "mirostat": 0},
         {"temperature": 0.5, "top_k": 20, "top_p": 0.75, "min_p": 0.25, "repetition_penalty": 1.5}),
        ({"temp": -1.0, "top_k": -1}, {"temperature": 0.0, "top_k": 0}),
        ({}, {}),
        ({"top_p": 1.5}, r"general.sampling.top_p: expected \(0.0, 1.0\], got 1.5; `generation_config: none`"),
    ],
)  # fmt: skip
def test_defaults_of_sampling_in_gguf(
    tmp_path: Path, tokenizer: Tokenizer, given: dict[str, float], found: dict[str, float] | str
) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, value in given.items():
        (writer.add_int32 if isinstance(value, int) else writer.add_float32)(
            f"general.sampling.{name}", value
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    read = lambda: read_words(ServedModel("m", str(tmp_path / "m.gguf"), 64), lambda path: tokenizer).sampling
    if isinstance(found, dict):
        assert read() == found
    else:
        with pytest.raises(CheckpointError, match=f"m.gguf: {found}"):
            read()


def test_a_switch_of_vllm_is_understood(folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "generation_config.json").write_text('{"top_k": -1, "temperature": null}')
    assert read_words(ServedModel("m", str(folder), 64), lambda path: tokenizer).sampling == {"top_k": 0}


def test_what_the_first_text_would_wait_for_is_done_before() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.warm()
    assert {"longest", "_plain"} <= vars(tokenizer.vocabulary).keys()
    assert {"special_tokens", "_splitter", "eos_token_id"} <= vars(tokenizer).keys()
