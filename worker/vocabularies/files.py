"""Which files a checkpoint keeps its tokenizer in."""

from __future__ import annotations

from pathlib import Path

from flm.worker.errors import CheckpointError
from flm.worker.gguf_file import GGUFFile
from flm.worker.tokenizer import Tokenizer
from flm.worker.vocabularies.base import Vocabulary
from flm.worker.vocabularies.config import TokenizerConfig, read_config

EXPECTED = "tokenizer.json, tokenizer.model, qwen.tiktoken, ice_text.model, or vocab.json with merges.txt"


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model directory or of a .gguf file. Raises CheckpointError."""
    if not path.is_dir():
        from flm.worker.vocabularies import gguf

        return gguf.read_tokenizer(GGUFFile(path))
    config = read_config(path)
    vocabulary, ends = _read(path, config)
    return Tokenizer(
        vocabulary,
        bos_token=config.token("bos_token") or ends[0],
        eos_token=config.token("eos_token") or ends[1],
        chat_template=config.chat_template,
    )


def _read(path: Path, config: TokenizerConfig) -> tuple[Vocabulary, tuple[str | None, str | None]]:
    """The vocabulary, and its own tokens that begin and end a text. Libraries are imported as they are needed."""
    if (path / "tokenizer.json").is_file():
        from flm.worker.vocabularies import library

        return library.read_json_file(path / "tokenizer.json"), (None, None)
    raise CheckpointError(str(path), f"expected {EXPECTED} in this directory")
