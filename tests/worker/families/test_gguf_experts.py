"""GGUF of mixtures of experts: written from golden checkpoints as llama.cpp's converter lays them out, they give the golden
logits, however the experts are spread."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf_writer import TOP, add_matrix, write
from safetensors.numpy import load_file

from flm.worker import Engine
from flm.worker.checkpoints.checkpoint import open_checkpoint
from flm.worker.errors import CheckpointError
from flm.worker.families.gguf_experts import experts
from flm.worker.files.gguf_file import GGUFTensor
from flm.worker.files.json_fields import Fields

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
}
Tensors = dict[str, np.ndarray]
CASES = ["deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe"]
ARCHITECTURES = {"deepseek_v": "deepseek2", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}


def own_name(rest: str) -> str:
    """llama.cpp's name of what stands in a layer."""
    if rest in NAMES:
        return NAMES[rest]
    rest = re.sub(r"mlp\.shared_experts?\.(\w+)_proj", r"ffn_\1_shexp", rest)
    rest = re.sub(r"mlp\.(\w+)_proj", r"ffn_\1", rest)
    return re.sub(r"self_attn\.([qkv])_(proj|norm)", lambda m: f"attn_{m[1]}{m[2][4:] or ''}", rest).replace(
        "attn_qnorm", "attn_q_norm"
    )


def tensors_of(directory: Path, config: dict[str, Any], turned: bool) -> Tensors:
    found, experts = {}, {}
    for name, values in load_file(directory / "model.safetensors").items():
        if name in TOP:
            found[TOP[name]] = values
            continue
        _, _, layer, rest = name.split(".", 3)
        block = f"blk.{layer}."
        expert = re.match(r"mlp\.experts\.(\d+)\.(\w+)_proj\.weight", rest)
        if expert:
            experts.setdefault(f"{block}ffn_{expert[2]}_exps.weight", {})[int(expert[1])] = values
        elif rest.endswith(("q_norm.weight", "k_norm.weight")):
            found[f"{block}attn_{rest.split('.')[1]}.weight"] = values
        elif rest.endswith("kv_b_proj.weight") and turned:
            plain, width = config["qk_nope_head_dim"], config["qk_nope_head_dim"] + config["v_head_dim"]
            heads = values.reshape(-1, width, values.shape[1])
            found[block + "attn_k_b.weight"] = np.ascontiguousarray(heads[:, :plain].transpose(0, 2, 1))
            found[block + "attn_v_b.weight"] = np.ascontiguousarray(heads[:, plain:])
        else:
            own = own_name(rest)
            found[block + own] = values.reshape(-1) if own.startswith("ffn_gate_inp_shexp") else values
    stacked = {name: np.stack([parts[e] for e in sorted(parts)]) for name, parts in experts.items()}
    return found | stacked


def add_fields(add: Callable[[str, Any], None], c: dict[str, Any], turned: bool) -> None:
    rope = c.get("rope_parameters") or c
    add("embedding_length", c["hidden_size"])
    add("block_count", c["num_hidden_layers"])
    add("context_length", c["max_position_embeddings"])
    add("feed_forward_length", c["intermediate_size"])
    add("attention.head_count", c["num_attention_heads"])
    add("attention.layer_norm_rms_epsilon", c["rms_norm_eps"])
    add("rope.freq_base", float(rope["rope_theta"]))
    experts = c.get("n_routed_experts") or c.get("num_experts") or c["num_local_experts"]
    add("expert_count", experts)
    add("expert_used_count", c["num_experts_per_tok"])
    add("expert_feed_forward_length", c["moe_intermediate_size"])
    if "kv_lora_rank" not in c:
        add("attention.head_count_kv", c["num_key_value_heads"])
        add("attention.key_length", c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])
        return
    rotary, plain, value, rank = (
        c[n] for n in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    add("attention.head_count_kv", 1 if turned else c["num_attention_heads"])
    add("attention.key_length", rank + rotary if turned else plain + rotary)
    add("attention.value_length", rank if turned else value)
    if turned:
        add("attention.key_length_mla", plain + rotary)
        add("attention.value_length_mla", value)
    add("attention.kv_lora_rank", rank)
    if c["q_lora_rank"]:
        add("attention.q_lora_rank", c["q_lora_rank"])
    add("rope.dimension_count", rotary)
    add("rope.scaling.type", "yarn")
    add("rope.scaling.factor", float(rope["factor"]))
    add("rope.scaling.original_context_length", rope["original_max_position_embeddings"])
    add("rope.scaling.yarn_log_multiplier", 0.1 * rope["mscale_all_dim"])
    add("expert_weights_scale", float(c["routed_scaling_factor"]))
    add("expert_weights_norm", c["norm_topk_prob"])
    add("expert_gating_func", 2 if c["model_type"] == "deepseek_v3" else 1)
    if c["n_group"]:
        add("expert_group_count", c["n_group"])
        add("expert_group_used_count", c["topk_group"])


def gguf_of(name: str, target: Path, turned: bool = False, edit: Callable[[Tensors], None] = len) -> Path:
    config = json.loads((GOLDEN / name / "config.json").read_text())
    architecture = next(own for start, own in ARCHITECTURES.items() if name.startswith(start))
    writer = GGUFWriter(target, architecture)

    def add(key: str, value: Any) -> None:
        adders = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        adders[type(value)](f"{architecture}.{key}", value)

    add_fields(add, config, turned)
    tensors = tensors_of(GOLDEN / name, config, turned)
    edit(tensors)
    for raw, values in tensors.items():
        add_matrix(writer, raw, values, "F32")
    write(writer)
    return target


@pytest.mark.parametrize(("name", "turned"), [*((name, False) for name in CASES), ("deepseek_v3", True)])
def test_golden_logits_out_of_gguf(name: str, turned: bool, tmp_path: Path) -> None:
    path, ref = gguf_of(name, tmp_path / "m.gguf", turned), np.load(GOLDEN / name / "ref.npz")
    for options in ({}, {"tensor_parallel": 2}, {"tensor_parallel": 3, "expert_parallel": True}):
        with Engine(path, max_context=32, **options) as engine:  # type: ignore[arg-type]
            got = engine.logits(ref["ids"].tolist())
        assert np.abs(got - ref["logits"]).max() < 2e-4 * np.abs(ref["logits"]).max(), options


def test_configs_say_the_same_as_config_json(tmp_path: Path) -> None:
    for name in CASES:
        want, got = (
            open_checkpoint(p).config for p in (GOLDEN / name, gguf_of(name, tmp_path / f"{name}.gguf"))
        )
        assert got.experts == want.experts
        assert got.attention.latent == want.attention.latent


def test_missing_experts_are_named(tmp_path: Path) -> None:
    def fewer(tensors: Tensors) -> None:
        tensors["blk.2.ffn_up_exps.weight"] = tensors["blk.2.ffn_up_exps.weight"][:-1]

    with pytest.raises(
        CheckpointError, match=r"blk.2.ffn_up_exps.weight.*\[192, 64\] expected, found \[168, 64\]"
    ):
        open_checkpoint(gguf_of("qwen3_moe", tmp_path / "m.gguf", edit=fewer))


@pytest.mark.parametrize(
    ("count", "gating", "groups", "kept"), [(160, 1, 8, 3), (256, 2, 8, 4), (64, 1, 1, 1), (384, 2, 1, 1)]
)
def test_groups_that_early_files_leave_out(
    count: int, gating: int, groups: int, kept: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = {"expert_count": count, "expert_used_count": 6, "expert_feed_forward_length": 32, "block_count": 1}
    tensors = {"blk.0.ffn_gate_inp.weight": GGUFTensor("F32", (count, 32), 1, 4, 0, 0)}
    fields = Fields(tmp_path / "old.gguf", raw | {"expert_gating_func": gating})
    found = experts(SimpleNamespace(tensors=tensors), fields, "deepseek2")  # type: ignore[arg-type]
    assert found is not None
    assert (found.routing.groups, found.routing.groups_kept) == (groups, kept)
    assert [r.levelname for r in caplog.records] == ["WARNING"] * (groups > 1)
    assert "old.gguf: says nothing of groups" in caplog.text or groups == 1
    said = Fields(tmp_path / "new.gguf", fields.raw | {"expert_group_count": 1})
    plain = experts(SimpleNamespace(tensors=tensors), said, "deepseek2")  # type: ignore[arg-type]
    assert plain is not None
    assert plain.routing.groups == 1
