"""GGUF: metadata to ModelConfig, and recipes for GGUF's tensor names."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from flm.worker.config import AttentionConfig, FeedForwardConfig, ModelConfig, NormConfig, RopeConfig
from flm.worker.families import gguf_experts, hub
from flm.worker.families.family import Family
from flm.worker.families.gguf_layout import LAYOUTS, Layout, recipes
from flm.worker.files.gguf_file import GGUFFile
from flm.worker.files.json_fields import Fields

ROPE_FACTORS, _TOKENS = "rope_freqs.weight", "tokenizer.ggml.tokens"
_BAICHUAN_LAYERS, _BAICHUAN2_VOCAB = 40, 125696  # of the 13B, which has ALiBi; of the second generation
# tokens that end a turn; chat files often name only another one as their end of sequence
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>")


def family(config: ModelConfig) -> Family:
    """The family of a GGUF file with that config."""
    layout = LAYOUTS[config.family]
    return Family(config.family, (), lambda fields: config, lambda c: recipes(c, layout), (ROPE_FACTORS,))


def read_config(file: GGUFFile) -> ModelConfig:
    """The ModelConfig of a GGUF file. Raises CheckpointError for an architecture that is not known."""
    architecture = file.get("general.architecture")
    if architecture not in LAYOUTS:
        raise Fields(file.path, {}).fail(
            f"general.architecture: {architecture!r} is not supported; supported: {', '.join(LAYOUTS)}"
        )
    prefix, layout = architecture + ".", LAYOUTS[architecture]
    raw: dict[str, Any] = {key: file.get(key) for key in file.keys_under(prefix)}
    fields = Fields(file.path, raw, prefix)
    bos = _tokenizer_ids(file, "bos_token_id")
    width = fields.integer("feed_forward_length") // (2 if layout.doubled_width else 1)
    config = ModelConfig(
        family=architecture,
        hidden=fields.integer("embedding_length"),
        layers=fields.integer("block_count"),
        vocab=_vocab(file, fields),
        max_position=fields.integer("context_length"),
        norm=NormConfig(fields.number("attention.layer_norm_rms_epsilon"), sandwich=layout.sandwich),
        attention=_attention(file, fields, layout),
        feed_forward=FeedForwardConfig(width, "blk.0.ffn_up.bias" in file.tensors),
        experts=gguf_experts.experts(file, fields, architecture),
        tie_embeddings="output.weight" not in file.tensors,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=_eos(file),
    )
    return _with_traits(config, fields)


def _attention(file: GGUFFile, fields: Fields, layout: Layout) -> AttentionConfig:
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    if fields.get("attention.kv_lora_rank"):
        return gguf_experts.latent_attention(file, fields, _rope(file, fields, head_dim))
    first = "blk.0.attn_qkv" if layout.fused_qkv else "blk.0.attn_q"
    return AttentionConfig(
        heads=heads,
        kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope=_rope(file, fields, head_dim),
        qkv_bias=first + ".bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        score_scale=fields.number("attention.scale", 0.0) if fields.get("attention.scale") else 0.0,
    )


def _with_traits(config: ModelConfig, fields: Fields) -> ModelConfig:
    """What an architecture has beside Llama's decoder. MiniCPM's files of 2024 leave its scales out."""
    if config.family == "baichuan":
        alibi = config.layers == _BAICHUAN_LAYERS
        config = replace(config, unit_head=config.vocab == _BAICHUAN2_VOCAB)
        if alibi:
            config = replace(config, attention=replace(config.attention, rope=RopeConfig(), alibi=True))
    if config.family in ("minicpm", "granite"):
        mini = config.family == "minicpm"
        config = replace(
            config,
            embedding_scale=fields.number("embedding_scale", 12.0 if mini else 1.0),
            residual_scale=fields.number("residual_scale", 1.4 / math.sqrt(config.layers) if mini else 1.0),
            logit_scale=1.0 / fields.number("logit_scale", config.hidden / 256 if mini else 1.0),
        )
    return config


def _vocab(file: GGUFFile, fields: Fields) -> int:
    embedding = file.tensors.get("token_embd.weight")
    return fields.integer("vocab_size", embedding.shape[0] if embedding else None)


def _rope(file: GGUFFile, fields: Fields, head_dim: int) -> RopeConfig:
    if any(fields.items("rope.dimension_sections")):
        raise fields.fail("rope.dimension_sections: positions of images are not supported")
    rotary_dim = fields.integer("rope.dimension_count", head_dim)
    rope = RopeConfig(theta=fields.number("rope.freq_base", 10000.0), rotary_dim=rotary_dim)
    if ROPE_FACTORS in file.tensors:
        return replace(rope, scaling="factors", factors=_factors(file, rotary_dim // 2))
    kind = fields.get("rope.scaling.type") or ("linear" if fields.get("rope.scale_linear") else "none")
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise fields.fail(f"rope.scaling.type {kind!r} is not supported; supported: none, linear, yarn")
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    if kind == "linear":
        return replace(rope, scaling=kind, factor=factor)
    trained = fields.integer("rope.scaling.original_context_length", fields.integer("context_length"))
    magnitude = hub.yarn_mscale(factor, 1.0)
    return replace(rope, scaling=kind, factor=factor, original_max_position=trained, magnitude=magnitude)


def _factors(file: GGUFFile, count: int) -> tuple[float, ...]:
    """Llama 3.1's scaling, worked out by the converter: what each frequency is divided by."""
    tensor = file.tensors[ROPE_FACTORS]
    if tensor.type != "F32" or tensor.shape != (count,):
        raise Fields(file.path, {}).fail(
            f"tensor {ROPE_FACTORS!r}: F32 [{count}] expected, found {tensor.type} {list(tensor.shape)}"
        )
    factors = tuple(float(f) for f in file.read(ROPE_FACTORS).reshape(-1).view("<f4"))
    if not all(f > 0 for f in factors):
        raise Fields(file.path, {}).fail(f"tensor {ROPE_FACTORS!r}: factors > 0 expected")
    return factors


def _tokenizer_ids(file: GGUFFile, name: str) -> tuple[int, ...]:
    key = "tokenizer.ggml." + name
    return Fields(file.path, {key: file.get(key)}).token_ids(key)


def _eos(file: GGUFFile) -> tuple[int, ...]:
    """End of sequence, of turn and of message, and the turn's end that the chat template writes."""
    ids = {i for name in ("eos", "eot", "eom") for i in _tokenizer_ids(file, name + "_token_id")}
    template = file.get("tokenizer.chat_template") or ""
    ends = [token for token in _TURN_ENDS if isinstance(template, str) and token in template]
    if ends:
        tokens = Fields(file.path, {_TOKENS: file.get(_TOKENS)}).items(_TOKENS)
        ids |= {i for i, token in enumerate(tokens) if token in ends}
    return tuple(sorted(ids))
