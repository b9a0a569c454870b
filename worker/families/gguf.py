"""GGUF: metadata to ModelConfig, and recipes for GGUF's tensor names."""

from __future__ import annotations

from typing import Any

from flm.worker.canonical import EMBEDDING, FINAL_NORM, LM_HEAD, decoder_tensors
from flm.worker.config import AttentionConfig, FeedForwardConfig, ModelConfig, NormConfig, RopeConfig
from flm.worker.families.family import Family
from flm.worker.families.fields import Fields
from flm.worker.gguf_file import GGUFFile
from flm.worker.recipe import Recipe, interleaved

ARCHITECTURES = ("llama",)
ROPE_FACTORS = "rope_freqs.weight"
_STEMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", LM_HEAD: "output.weight"}
# tokens that end a turn; chat files often name only another one as their end of sequence
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>")


def gguf_name(canonical: str) -> str:
    """GGUF's name of a canonical tensor."""
    if canonical in _TOP:
        return _TOP[canonical]
    _, _, layer, rest = canonical.split(".", 3)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_STEMS[stem]}.{kind}"


def family(config: ModelConfig) -> Family:
    """The family of a GGUF file with that config."""
    return Family(config.family, (), lambda fields: config, _recipes, (ROPE_FACTORS,))


def _recipes(config: ModelConfig) -> dict[str, Recipe]:
    """GGUF keeps llama's q and k rows in pairs (2i, 2i + 1); the decoder rotates halves (i, i + d / 2)."""
    order = interleaved(config.attention.head_dim, config.attention.rope.rotary_dim)
    turns = lambda name: ".q_proj." in name or ".k_proj." in name
    return {
        name: Recipe(gguf_name(name), head_order=order if turns(name) else ())
        for name in decoder_tensors(config)
    }


def read_config(file: GGUFFile) -> ModelConfig:
    """The ModelConfig of a GGUF file. Raises CheckpointError for another architecture than llama."""
    architecture = file.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise Fields(file.path, {}).fail(
            f"general.architecture: {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    prefix = architecture + "."
    raw: dict[str, Any] = {key: file.get(key) for key in file.keys_under(prefix)}
    fields = Fields(file.path, raw, prefix)
    if (file.get("split.count") or 0) > 1:
        raise fields.fail(
            "one part of a model split over several files; one file expected (llama-gguf-split --merge)"
        )
    if fields.get("expert_count"):
        raise fields.fail(f"{prefix}expert_count: mixtures of experts are not supported")
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    bos = _tokenizer_ids(file, "bos_token_id")
    return ModelConfig(
        family=architecture,
        hidden=hidden,
        layers=fields.integer("block_count"),
        vocab=_vocab(file, fields),
        max_position=fields.integer("context_length"),
        norm=NormConfig(fields.number("attention.layer_norm_rms_epsilon")),
        attention=AttentionConfig(
            heads=heads,
            kv_heads=fields.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            rope=_rope(file, fields, head_dim),
            qkv_bias="blk.0.attn_q.bias" in file.tensors,
            output_bias="blk.0.attn_output.bias" in file.tensors,
        ),
        feed_forward=FeedForwardConfig(
            fields.integer("feed_forward_length"), "blk.0.ffn_gate.bias" in file.tensors
        ),
        tie_embeddings="output.weight" not in file.tensors,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=_eos(file),
    )


def _vocab(file: GGUFFile, fields: Fields) -> int:
    embedding = file.tensors.get("token_embd.weight")
    return fields.integer("vocab_size", embedding.shape[0] if embedding else None)


def _rope(file: GGUFFile, fields: Fields, head_dim: int) -> RopeConfig:
    rotary_dim = fields.integer("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        raise fields.fail(
            f"llama.rope.dimension_count: {head_dim} (the head size) expected, found {rotary_dim}"
        )
    rope = RopeConfig(theta=fields.number("rope.freq_base", 10000.0), rotary_dim=rotary_dim)
    if ROPE_FACTORS in file.tensors:
        return RopeConfig(rope.theta, rotary_dim, "factors", factors=_factors(file, rotary_dim // 2))
    kind = fields.get("rope.scaling.type") or ("linear" if fields.get("rope.scale_linear") else "none")
    if kind == "none":
        return rope
    if kind != "linear":
        raise fields.fail(f"llama.rope.scaling.type {kind!r} is not supported; supported: none, linear")
    legacy = fields.number("rope.scale_linear", 1.0)
    return RopeConfig(rope.theta, rotary_dim, "linear", fields.number("rope.scaling.factor", legacy))


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
        tokens = file.get("tokenizer.ggml.tokens") or []
        ids |= {i for i, token in enumerate(tokens) if token in ends}
    return tuple(sorted(ids))
