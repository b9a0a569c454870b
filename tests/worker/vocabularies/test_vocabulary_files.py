"""Which file a tokenizer is read from, and that a library is imported only where its kind of file is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_vocabularies import byte_pairs, rank_file, sentencepiece_model, write

from flm.worker.errors import CheckpointError
from flm.worker.vocabularies import patterns
from flm.worker.vocabularies.config import read_config
from flm.worker.vocabularies.files import is_rank_file, load_tokenizer


def test_rank_files_and_sentencepiece_models_are_told_apart() -> None:
    ranks = rank_file(byte_pairs(patterns.LLAMA3, 5))
    assert is_rank_file(ranks)
    assert is_rank_file(ranks.replace(b"\n", b"\r\n"))
    assert not is_rank_file(sentencepiece_model())
    assert not is_rank_file(b"")


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    model = sentencepiece_model()
    write(tmp_path, {"tokenizer.model": model, "tokenizer.json": byte_pairs(patterns.GPT2).to_str()})
    assert load_tokenizer(tmp_path).vocab_size == 256 + 60
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path).vocab_size == 420


def test_special_tokens_map_fills_gaps(tmp_path: Path) -> None:
    roles = {"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>", "pad_token": "</s>"}
    write(
        tmp_path,
        {"special_tokens_map.json": roles, "tokenizer_config.json": {"eos_token": "</s>", "bos_token": None}},
    )
    config = read_config(tmp_path)
    assert (config.token("bos_token"), config.token("eos_token")) == ("<s>", "</s>")
    write(tmp_path, {"chat_template.json": {"chat_template": "J"}})
    assert read_config(tmp_path).chat_template == "J"
    write(tmp_path, {"chat_template.json": {"chat_template": 7}})
    with pytest.raises(
        CheckpointError, match=r"chat_template\.json: chat_template: a template's text expected"
    ):
        read_config(tmp_path)


def test_nothing_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, flm.cluster.gateway.gateway_process, flm.worker.engine; "
        "sys.exit(str({'tokenizers', 'sentencepiece', 'tiktoken'} & set(sys.modules) or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr.strip() == ""
