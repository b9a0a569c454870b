"""Which files a checkpoint keeps its tokenizer in."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from flm.worker.errors import CheckpointError, FlmError
from flm.worker.files.gguf_file import GGUFFile
from flm.worker.vocabularies.base import Vocabulary
from flm.worker.vocabularies.config import TokenizerConfig, read_config
from flm.worker.vocabularies.tokenizer import Tokenizer

LEAST_USED = 0.75  # of an embedding's rows; published models pad theirs by a few in a hundred
MAX_TOKENS = 1 << 24  # far beyond any vocabulary's, far below what a damaged number can ask for
EXPECTED = "tokenizer.json, tokenizer.model, qwen.tiktoken, ice_text.model, or vocab.json with merges.txt"


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model directory or of a .gguf file. Raises CheckpointError, whatever is wrong with it."""
    try:
        return _load(path)
    except FlmError:
        raise
    except Exception as error:  # files of others, read by libraries that raise what they like
        raise CheckpointError(str(path), f"its tokenizer cannot be read: {error!r}") from error


def _load(path: Path) -> Tokenizer:
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


def checked(tokenizer: Tokenizer, rows: int, file: str) -> Tokenizer:
    """The tokenizer of a model whose embedding has `rows` rows. CheckpointError where it has far fewer tokens, or ids
    beyond them, but for those of marks that some models lack though their tokenizer has them: texts that spell these are
    refused."""
    if tokenizer.vocab_size > MAX_TOKENS:
        raise CheckpointError(
            file, f"its tokenizer has ids up to {tokenizer.vocab_size - 1}; below {MAX_TOKENS} expected"
        )
    beyond = [tokenizer.token(i) for i in range(rows, tokenizer.vocab_size)]
    wrong = [token for token in beyond if token is not None and not _SPARE.fullmatch(token)]
    if wrong:
        raise CheckpointError(
            file,
            f"its tokenizer has {tokenizer.vocab_size} tokens and its embedding {rows} rows; expected a row for every "
            f"token, the first without is {wrong[0]!r}",
        )
    if tokenizer.vocab_size < LEAST_USED * rows:
        raise CheckpointError(
            file,
            f"its tokenizer has {tokenizer.vocab_size} tokens and its embedding {rows} rows; a token for nearly every row "
            "expected: the tokenizer is another model's",
        )
    return replace(tokenizer, rows=rows)


# Code Llama's marks for infilling, which its 34B lacks; padding, which trainers add and generation has no use for
_SPARE = re.compile(r"▁<(SU|SUF|PRE|M|MID|E|EOT)>?(<EOT>)*|\[PAD\]|<pad>", re.IGNORECASE)


def _read(path: Path, config: TokenizerConfig) -> tuple[Vocabulary, list[str | None]]:
    """The vocabulary, and its own tokens that begin and end a text. Libraries are imported as they are needed."""
    if (path / "tokenizer.json").is_file():
        from flm.worker.vocabularies import library

        return library.read_json_file(path / "tokenizer.json", config), [None, None]
    for name in ("tokenizer.model", "qwen.tiktoken", "ice_text.model"):
        if (path / name).is_file():
            return _read_model(path / name, config)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        from flm.worker.vocabularies import library

        return library.read_merges(path, config), [None, None]
    raise CheckpointError(str(path), f"expected {EXPECTED} in this directory")


def _read_model(file: Path, config: TokenizerConfig) -> tuple[Vocabulary, list[str | None]]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(str(file), f"cannot be read: {error.strerror or error}") from error
    if file.name == "qwen.tiktoken" or is_rank_file(data):
        from flm.worker.vocabularies import tiktoken_file

        kind = tiktoken_file.QWEN if file.name == "qwen.tiktoken" else tiktoken_file.GLM4
        return tiktoken_file.read(file, data, kind, config)
    if file.name == "ice_text.model":
        from flm.worker.vocabularies import glm

        return glm.read_ice_text(file, data, config)
    if config.kind == "ChatGLMTokenizer":
        from flm.worker.vocabularies import glm

        return glm.read_chatglm2(file, data)
    from flm.worker.vocabularies import sentencepiece_model

    return sentencepiece_model.read(file, data, config)


def is_rank_file(data: bytes) -> bool:
    """Whether this is a rank file ("base64 rank" a line) and no SentencePiece model: both are called tokenizer.model."""
    return re.match(rb"[A-Za-z0-9+/=]+ \d+\r?(\n|\Z)", data[:4096]) is not None
