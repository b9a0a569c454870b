"""How GGUF lays out each architecture's tensors (github.com/ggml-org/llama.cpp, gguf-py and convert_hf_to_gguf.py)."""

from __future__ import annotations

from dataclasses import dataclass

from flm.worker.canonical import EMBEDDING, FINAL_NORM, LM_HEAD, decoder_tensors
from flm.worker.config import ModelConfig
from flm.worker.families import gguf_experts
from flm.worker.families.family import thirds
from flm.worker.tensors.recipe import Recipe, interleaved

_STEMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_mlp_layernorm": "post_ffw_norm",
}
_TOP = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", LM_HEAD: "output.weight"}


@dataclass(frozen=True)
class Layout:
    """`pairs`: rows of q and k stand in pairs (2i, 2i + 1) that rotate together, where the decoder rotates halves.
    `fused_qkv`: one tensor of q, k and v. `fused_up`: ffn_up holds the gate and then up. `doubled_width`:
    feed_forward_length counts both. `sandwich`: see NormConfig."""

    pairs: bool
    fused_qkv: bool = False
    fused_up: bool = False
    doubled_width: bool = False
    sandwich: bool = False


LAYOUTS = {
    "llama": Layout(pairs=True),
    "qwen": Layout(pairs=False, fused_qkv=True, doubled_width=True),
    "qwen2": Layout(pairs=False),
    "qwen3": Layout(pairs=False),
    "internlm2": Layout(pairs=True),
    "baichuan": Layout(pairs=True),
    "xverse": Layout(pairs=True),
    "minicpm": Layout(pairs=True),
    "granite": Layout(pairs=True),
    "chatglm": Layout(pairs=True, fused_qkv=True, fused_up=True),
    "glm4": Layout(pairs=True, fused_up=True, sandwich=True),
    "qwen2moe": Layout(pairs=False),
    "qwen3moe": Layout(pairs=False),
    "deepseek2": Layout(pairs=False),
}


def gguf_name(canonical: str) -> str:
    """GGUF's name of a canonical tensor that has one of its own."""
    if canonical in _TOP:
        return _TOP[canonical]
    _, _, layer, rest = canonical.split(".", 3)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_STEMS[stem]}.{kind}"


def recipes(config: ModelConfig, layout: Layout) -> dict[str, Recipe]:
    """Where each canonical tensor lies."""
    a, inner = config.attention, config.feed_forward.intermediate
    order = interleaved(a.head_dim, a.rope.rotary_dim or a.head_dim) if layout.pairs else ()
    found = {}
    for name in decoder_tensors(config):
        special = gguf_experts.recipe(config, name)
        if special is not None:
            found[name] = special
            continue
        own, part = gguf_name(name), name.split(".")[-2]
        head_order = order if part in ("q_proj", "k_proj") else ()
        if layout.fused_qkv and part in ("q_proj", "k_proj", "v_proj"):
            tensor = own.replace(f"attn_{part[0]}.", "attn_qkv.")
            found[name] = Recipe(tensor, thirds(config, part, tensor).offset, head_order=head_order)
        elif layout.fused_up and part in ("gate_proj", "up_proj"):
            found[name] = Recipe(own.replace("ffn_gate", "ffn_up"), inner if part == "up_proj" else 0)
        else:
            found[name] = Recipe(own, head_order=head_order, unit_rows=name == LM_HEAD and config.unit_head)
    return found
