"""Hugging Face directories: their configs, their slices, and how wrong ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_reference import from_directory
from safetensors.numpy import load_file, save_file

from flm.kernels.quant import bfloat16_bits
from flm.worker.canonical import decoder_tensors
from flm.worker.checkpoints.checkpoint import open_checkpoint
from flm.worker.config import RopeConfig, Span
from flm.worker.errors import CheckpointError
from flm.worker.layers.rope import inverse_frequencies

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
NAMES = ("llama2", "llama31", "llama_linear", "internlm1_as_llama")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a golden checkpoint, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "llama31", tmp_path / "model"))


def edit_json(path: Path, **fields: Any) -> None:
    raw = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in raw.items() if v != "absent"}))


def edit_tensors(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_golden_configs_and_tensors(name: str) -> None:
    checkpoint, reference = open_checkpoint(GOLDEN / name), from_directory(GOLDEN / name)
    c, a = checkpoint.config, checkpoint.config.attention
    assert (c.layers, a.heads, a.kv_heads, a.head_dim) == (
        reference.layers, reference.heads, reference.kv_heads, reference.head_dim,
    )  # fmt: skip
    assert c.norm.eps == reference.eps
    np.testing.assert_allclose(inverse_frequencies(a.rope), reference.inv_freq, rtol=1e-12)
    assert checkpoint.quantization == "float32"
    assert checkpoint.total_bytes == sum(w.nbytes for w in reference.weights.values())
    assert {name: spec.shape for name, spec in decoder_tensors(c).items()} == {
        k: w.shape for k, w in reference.weights.items()
    }
    assert a.qkv_bias is a.output_bias is (name == "internlm1_as_llama")
    for key, want in reference.weights.items():
        got = checkpoint.matrix(key).dequantize() if want.ndim == 2 else checkpoint.vector(key)
        np.testing.assert_array_equal(got, want)


def test_slices_and_what_is_kept_after_pages_are_dropped() -> None:
    checkpoint = open_checkpoint(GOLDEN / "llama2")
    name = "model.layers.2.self_attn.o_proj.weight"
    want = load_file(GOLDEN / "llama2" / "model.safetensors")[name]
    got = checkpoint.matrix(name, Span(1, 40), Span(16, 48))
    np.testing.assert_array_equal(got.dequantize(), want[1:40, 16:48])


def test_bfloat16_directory(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    header: dict[str, Any] = {}
    data = b""
    for name, values in tensors.items():
        raw = bfloat16_bits(values).tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": values.shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    head = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    checkpoint = open_checkpoint(model)
    assert checkpoint.quantization == "bfloat16"
    for name, values in tensors.items():
        got = checkpoint.matrix(name).dequantize() if values.ndim == 2 else checkpoint.vector(name)
        np.testing.assert_allclose(got, values, rtol=2**-8)


OLD_SPELLINGS: list[tuple[dict[str, Any], RopeConfig]] = [
    ({}, RopeConfig(10000.0, 16)),
    ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(5e5, 16)),
    (
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        RopeConfig(1e4, 16, "linear", 2.0, original_max_position=64),
    ),
    (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4}},
        RopeConfig(1e4, 16, "dynamic", 4.0, original_max_position=64),
    ),
    (
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        RopeConfig(5e5, 16, "llama3", 8.0, 1.0, 4.0, 16),
    ),
    ({"partial_rotary_factor": 0.5}, RopeConfig(1e4, 8)),
]


INTERNLM_ROTARY: list[tuple[dict[str, Any], RopeConfig]] = [
    ({"base": 20000, "type": "origin"}, RopeConfig(2e4, 16)),
    ({"base": 10000, "type": "dynamic"}, RopeConfig(1e4, 16)),  # by one: never beyond the trained length
    (
        {"base": 10000, "type": "dynamic", "scaling_factor": 2.0},
        RopeConfig(1e4, 16, "dynamic", 2.0, original_max_position=64),
    ),
]


@pytest.mark.parametrize(("rotary", "rope"), INTERNLM_ROTARY)
def test_internlm_has_its_rotation_in_a_field_of_its_own(model: Path, rotary: Any, rope: RopeConfig) -> None:
    edit_json(
        model / "config.json", architectures=["InternLMForCausalLM"], rope_parameters="absent", rotary=rotary
    )
    assert open_checkpoint(model).config.attention.rope == rope
    edit_json(model / "config.json", rotary={"base": 1e4, "type": "spiral"})
    with pytest.raises(CheckpointError, match="rope scaling 'spiral' is not supported"):
        open_checkpoint(model)


@pytest.mark.parametrize(("fields", "rope"), OLD_SPELLINGS)
def test_rope_in_the_old_spelling(model: Path, fields: dict[str, Any], rope: RopeConfig) -> None:
    edit_json(model / "config.json", rope_parameters="absent", **fields)
    assert open_checkpoint(model).config.attention.rope == rope


def test_defaults_of_absent_fields(model: Path) -> None:
    edit_json(
        model / "config.json",
        head_dim="absent",
        rms_norm_eps="absent",
        attention_bias="absent",
        mlp_bias="absent",
        tie_word_embeddings="absent",
        hidden_act="absent",
    )
    config = open_checkpoint(model).config
    assert (config.attention.head_dim, config.norm.eps, config.tie_embeddings) == (16, 1e-6, False)


def test_internlm_bias_key_and_tied_embeddings(tmp_path: Path) -> None:
    model = Path(shutil.copytree(GOLDEN / "internlm1_as_llama", tmp_path / "m"))
    fields = {"architectures": ["InternLMForCausalLM"], "bias": True, "attention_bias": "absent"}
    edit_json(model / "config.json", tie_word_embeddings=True, **fields)
    edit_tensors(model, lambda t: t.pop("lm_head.weight"))
    config = open_checkpoint(model).config
    assert (config.family, config.attention.qkv_bias, config.attention.output_bias) == (
        "internlm",
        True,
        True,
    )
    assert config.tie_embeddings


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [(2, 2, (2,)), ([7, 5], 2, (2, 5, 7)), (None, [3, 2], (2, 3)), (-1, None, ()), (4, "absent", (4,))],
)
def test_ends_are_those_of_both_configs(model: Path, config: Any, generation: Any, want: Any) -> None:
    edit_json(model / "config.json", eos_token_id=config)
    edit_json(model / "generation_config.json", eos_token_id=generation)
    assert open_checkpoint(model).config.eos_token_ids == want


BROKEN_CONFIGS: list[tuple[dict[str, Any], str]] = [
    (
        {"architectures": ["LamaForCausalLM"]},
        "'LamaForCausalLM' is not supported; the nearest supported one is LlamaForCausalLM; supported: ",
    ),
    ({"architectures": "absent", "model_type": "absent"}, "None is not supported; supported: Llama"),
    (
        {"architectures": "absent", "model_type": "qwen3_next"},
        "'qwen3_next' is not supported; the nearest supported one is Qwen3",
    ),
    (
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
        "'MistralForCausalLM' is not supported; supported: ",
    ),
    (
        {"architectures": ["OurOwnForCausalLM"], "model_type": "llama"},
        "the nearest supported one is LlamaForCausalLM",
    ),
    (
        {"architectures": ["FooForCausalLM"], "auto_map": {"AutoModel": "foo.Foo"}},
        "the code that comes with the checkpoint (auto_map) is never run",
    ),
    ({"rope_parameters": {"rope_theta": 1}}, "rope_theta: a number > 1 expected, found 1"),
    ({"hidden_size": "absent"}, "hidden_size is missing; a whole number >= 1 expected"),
    ({"hidden_size": "64"}, "hidden_size: a whole number >= 1 expected, found '64'"),
    ({"hidden_size": 2**31}, "hidden_size: at most 2147483647 expected, found 2147483648"),
    ({"num_hidden_layers": 2**31 - 1}, "at most 4096 layers expected, found 2147483647"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: a whole number >= 1 expected, found 0"),
    ({"vocab_size": 96.5}, "vocab_size: a whole number"),
    ({"rms_norm_eps": -1}, "rms_norm_eps: a number > 0 expected, found -1"),
    ({"num_key_value_heads": 3}, "4 attention heads cannot be shared by 3 key-value heads"),
    ({"head_dim": 15}, "an even head size expected, found 15"),
    ({"hidden_act": "gelu"}, "hidden_act: 'silu' expected, found 'gelu'"),
    ({"attention_bias": "yes"}, "attention_bias: true or false expected, found 'yes'"),
    (
        {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}},
        "rope scaling 'longrope' is not supported",
    ),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
    ({"rope_parameters": 3}, "rope_parameters: an object expected"),
    (
        {"quantization_config": {"quant_method": "eetq"}},
        "quantization method 'eetq' is not supported; supported: gptq",
    ),
    ({"eos_token_id": [96]}, "ids below the vocabulary's 96 expected"),
    ({"eos_token_id": "2"}, "eos_token_id: a token id or a list of them expected"),
    ({"intermediate_size": 96}, "mlp.gate_proj.weight': shape [96, 64] expected, found [80, 64]"),
    ({"vocab_size": 100}, "'model.embed_tokens.weight': shape [100, 64] expected, found [96, 64]"),
    ({"num_hidden_layers": 4}, "tensor 'model.layers.3.input_layernorm.weight' [64] is missing"),
    ({"attention_bias": True}, "self_attn.q_proj.bias' [64] is missing"),
]


@pytest.mark.parametrize(("fields", "message"), BROKEN_CONFIGS)
def test_broken_configs_say_what_was_expected(model: Path, fields: dict[str, Any], message: str) -> None:
    edit_json(model / "config.json", **fields)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    assert message in str(caught.value)
    assert str(model) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_config_that_is_no_json_object(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: (is not JSON|a JSON object expected)"):
        open_checkpoint(model)


def test_missing_and_foreign_tensors(model: Path) -> None:
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(model, lambda t: t.update({table: np.zeros(8, np.float32)}))
    open_checkpoint(model)  # tables of old checkpoints hold no weights
    edit_tensors(model, lambda t: t.update(extra=np.zeros(3, np.float32)))
    with pytest.raises(CheckpointError, match="tensors that the model does not have: 'extra'"):
        open_checkpoint(model)
    edit_tensors(model, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' \[80, 64\] is missing"
    ):
        open_checkpoint(model)
    edit_tensors(model, lambda t: [t.pop(name) for name in list(t) if ".mlp." in name])
    with pytest.raises(
        CheckpointError, match=r"is missing, as are .*down_proj.weight. \[64, 80\], .* and 5 more$"
    ):
        open_checkpoint(model)


def test_integer_weights_are_refused(model: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(model, lambda t: t.update({name: np.zeros((80, 64), np.int8)}))
    with pytest.raises(CheckpointError, match="dtype I8; weights in F32, F16, BF16 expected"):
        open_checkpoint(model)
