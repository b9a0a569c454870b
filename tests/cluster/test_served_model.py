"""What the gateway says of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from flm.cluster import served_model
from flm.cluster.served_model import LoadedModel, ServedModel
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
        config = type("Config", (), {"eos_token_ids": (2, 7)})

    monkeypatch.setattr(served_model, "resolve_model_path", Path)
    monkeypatch.setattr(served_model, "open_checkpoint", lambda path: Opened)
    assert list(loaded(tokenizer).info().eos_token_ids) == [2, 7]
