"""The Llama family: RMSNorm, grouped-query attention with rotate-half RoPE, SwiGLU.

Canonical tensor names are those of Hugging Face's Llama. InternLM 1 is this decoder with biases.
"""

from __future__ import annotations

from pathlib import Path

from flm.worker.config import ModelConfig, RopeConfig
from flm.worker.errors import CheckpointError
from flm.worker.families.fields import Fields, read_json

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",  # early conversions of LLaMA 1
    "InternLMForCausalLM": "internlm",
}
EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_ROPE_SCALINGS = ("default", "linear", "dynamic", "llama3")


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def read_config(directory: Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory, in transformers' old and new spelling of the fields."""
    fields = read_json(directory / "config.json")
    family = _family(fields)
    quantized = fields.section("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method")
        raise fields.fail(
            f"quantization_config {method!r} is not supported; expected float weights (or a .gguf file)"
        )
    if fields.get("hidden_act") not in (None, "silu", "swish"):
        raise fields.fail(f"hidden_act: 'silu' expected, found {fields.get('hidden_act')!r}")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", hidden // heads)
    max_position = fields.integer("max_position_embeddings", 2048)
    bias = fields.flag("bias", False) if family == "internlm" else fields.flag("attention_bias", False)
    bos = fields.token_ids("bos_token_id")
    config = ModelConfig(
        family=family,
        hidden=hidden,
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate=fields.integer("intermediate_size"),
        vocab=fields.integer("vocab_size"),
        max_position=max_position,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, head_dim, max_position),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=_eos(fields, directory / "generation_config.json"),
    )
    return validated(config, fields.file)


def _family(fields: Fields) -> str:
    names = fields.get("architectures")
    found = names[0] if isinstance(names, list) and names else None
    if found not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise fields.fail(f"architectures: {found!r} is not supported; supported: {supported}")
    return ARCHITECTURES[found]


def _eos(fields: Fields, generation: Path) -> tuple[int, ...]:
    ids = fields.token_ids("eos_token_id")
    if generation.is_file():
        ids += read_json(generation).token_ids("eos_token_id")
    return tuple(sorted(set(ids)))


def _rope(fields: Fields, head_dim: int, max_position: int) -> RopeConfig:
    """`rope_parameters` (transformers ≥ 5), or `rope_scaling` beside `rope_theta`."""
    scaling = fields.section("rope_parameters") or fields.section("rope_scaling") or Fields(fields.file, {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in _ROPE_SCALINGS:
        raise fields.fail(f"rope scaling {kind!r} is not supported; supported: {', '.join(_ROPE_SCALINGS)}")
    theta = scaling if scaling.get("rope_theta") is not None else fields
    part = scaling if scaling.get("partial_rotary_factor") is not None else fields
    rotary_dim = int(head_dim * part.number("partial_rotary_factor", 1.0))
    rope = RopeConfig(theta=theta.number("rope_theta", 10000.0), rotary_dim=rotary_dim)
    if kind == "default":
        return rope
    return RopeConfig(
        theta=rope.theta,
        rotary_dim=rotary_dim,
        scaling=kind,
        factor=scaling.number("factor"),
        low_freq_factor=scaling.number("low_freq_factor") if kind == "llama3" else 1.0,
        high_freq_factor=scaling.number("high_freq_factor") if kind == "llama3" else 4.0,
        original_max_position=scaling.integer(
            "original_max_position_embeddings", *(() if kind == "llama3" else (max_position,))
        ),
    )


def validated(config: ModelConfig, file: Path) -> ModelConfig:
    """The config itself. Raises CheckpointError where its sizes cannot belong together."""
    c = config
    rope, blend = c.rope, (c.rope.low_freq_factor, c.rope.high_freq_factor)
    wrong = [
        (c.heads % c.kv_heads, f"{c.heads} attention heads cannot be shared by {c.kv_heads} key-value heads"),
        (c.head_dim % 2, f"an even head size expected, found {c.head_dim}"),
        (
            rope.rotary_dim % 2 or not 0 < rope.rotary_dim <= c.head_dim,
            f"an even rotary size of at most {c.head_dim} (the head size) expected, found {rope.rotary_dim}",
        ),
        (
            rope.scaling == "llama3" and blend[0] >= blend[1],
            f"rope scaling: low_freq_factor {blend[0]} must be below high_freq_factor {blend[1]}",
        ),
        (
            any(i >= c.vocab for i in c.eos_token_ids),
            f"eos_token_id: ids below the vocabulary's {c.vocab} expected, found {list(c.eos_token_ids)}",
        ),
    ]
    for bad, message in wrong:
        if bad:
            raise CheckpointError(str(file), message)
    return config


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that the decoder needs, by canonical name."""
    c = config
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (c.vocab, c.hidden), FINAL_NORM: (c.hidden,)}
    if not c.tie_embeddings:
        shapes[LM_HEAD] = (c.vocab, c.hidden)
    linears = {
        "self_attn.q_proj": ((q, c.hidden), c.attention_bias),
        "self_attn.k_proj": ((kv, c.hidden), c.attention_bias),
        "self_attn.v_proj": ((kv, c.hidden), c.attention_bias),
        "self_attn.o_proj": ((c.hidden, q), c.output_bias),
        "mlp.gate_proj": ((c.intermediate, c.hidden), c.mlp_bias),
        "mlp.up_proj": ((c.intermediate, c.hidden), c.mlp_bias),
        "mlp.down_proj": ((c.hidden, c.intermediate), c.mlp_bias),
    }
    for layer in range(c.layers):
        prefix = layer_prefix(layer)
        shapes[prefix + "input_layernorm.weight"] = shapes[prefix + "post_attention_layernorm.weight"] = (
            c.hidden,
        )
        for name, (shape, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if bias:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    return shapes
