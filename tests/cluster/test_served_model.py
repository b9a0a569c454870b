"""What the gateway says of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from flm.cluster import served_model
from flm.cluster.admission import admit
from flm.cluster.served_model import LoadedModel, ServedModel
from flm.cluster.templates import ChatTemplate
from flm.proto import flm_pb2
from flm.worker.errors import CheckpointError
from flm.worker.tokenizer import Tokenizer
from flm.worker.vocabularies.library import LibraryVocabulary


def loaded(tokenizer: Tokenizer, path: str = "nowhere") -> LoadedModel:
    return LoadedModel(ServedModel("m", path, 64), tokenizer, lambda: None, "")


def test_a_tokens_text_keeps_its_space() -> None:
    inner = RustTokenizer(models.BPE(vocab={"▁the": 0, "a": 1, "<0xE4>": 2}, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model = loaded(Tokenizer(LibraryVocabulary(inner)))
    assert [model.token_text(i) for i in range(3)] == [" the", "a", "\ufffd"]
    assert model.tokenizer.decode([0]) == "the"


def test_ends_are_those_of_the_checkpoint(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(loaded(tokenizer).info().eos_token_ids) == [256]  # no checkpoint: the tokenizer's

    class Opened:
        config = type("Config", (), {"eos_token_ids": (2, 7), "vocab": 257})

    monkeypatch.setattr(served_model, "resolve_model_path", Path)
    monkeypatch.setattr(served_model, "open_checkpoint", lambda path: Opened)
    assert list(loaded(tokenizer).info().eos_token_ids) == [2, 7]


def test_what_ends_an_answer_besides_what_workers_know(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = type("Config", (), {"eos_token_ids": (2,), "vocab": 257})
    monkeypatch.setattr(served_model, "resolve_model_path", Path)
    monkeypatch.setattr(served_model, "open_checkpoint", lambda path: type("Opened", (), {"config": config}))
    template = ChatTemplate("", stop_ids=(2, 256), stop_strings=("Human:",))
    monkeypatch.setattr(served_model, "choose_template", lambda *given: template)
    model = loaded(tokenizer)
    assert list(model.info().eos_token_ids) == [2, 256]
    options = admit(flm_pb2.SamplingOptions(stop_token_ids=[9], stop=[b"x"]), 1, 64)
    chat, plain = model.with_ends(options, chat=True), model.with_ends(options, chat=False)
    assert chat.params.stop_token_ids == plain.params.stop_token_ids == (9, 256)  # the worker knows 2 itself
    assert (chat.stops, plain.stops) == (("x", "Human:"), ("x",))
    kept = admit(flm_pb2.SamplingOptions(ignore_eos=True), 1, 64)
    assert model.with_ends(kept, chat=True) == kept


def test_a_tokenizer_with_more_ids_than_the_model_has_rows(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = type("Config", (), {"eos_token_ids": (2,), "vocab": 256})
    monkeypatch.setattr(served_model, "resolve_model_path", Path)
    monkeypatch.setattr(served_model, "open_checkpoint", lambda path: type("Opened", (), {"config": config}))
    with pytest.raises(
        CheckpointError, match=r"nowhere: its tokenizer has 257 tokens and its embedding 256 rows"
    ):
        loaded(tokenizer)
