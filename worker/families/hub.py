"""Reading config.json: what the families of the hub have in common."""

from __future__ import annotations

import math
from dataclasses import replace

from flm.worker.config import ModelConfig, RopeConfig
from flm.worker.errors import CheckpointError
from flm.worker.files.json_fields import Fields, read_json

# far beyond any model's, far below what a damaged number can ask for
MAX_LAYERS, MAX_EXPERTS, MAX_HEAD, MAX_POSITIONS = 4096, 1 << 18, 1 << 16, 1 << 24
_ROPE_SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")


def architecture(fields: Fields) -> str | None:
    """The first that config.json names."""
    names = fields.items("architectures")
    if names and not isinstance(names[0], str):
        raise fields.fail(f"architectures: a list of names expected, found {names[0]!r}")
    return names[0] if names else None


def check_activation(fields: Fields, name: str = "hidden_act", wanted: str = "silu") -> None:
    """CheckpointError for another activation."""
    if fields.get(name) not in (None, wanted, *(("swish",) if wanted == "silu" else ())):
        raise fields.fail(f"{name}: {wanted!r} expected, found {fields.get(name)!r}")


def layer_count(fields: Fields) -> int:
    """Layers, bounded: what is listed for each of them must not be as long as a damaged number asks for."""
    layers = fields.integer("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise fields.fail(f"at most {MAX_LAYERS} layers expected, found {layers}")
    return layers


def first_token(fields: Fields) -> int | None:
    """The token that a text begins with."""
    ids = fields.token_ids("bos_token_id")
    return ids[0] if ids else None


def end_tokens(fields: Fields) -> tuple[int, ...]:
    """The ends of sequence of config.json and of generation_config.json together."""
    ids = fields.token_ids("eos_token_id")
    generation = fields.file.parent / "generation_config.json"
    if generation.is_file():
        ids += read_json(generation).token_ids("eos_token_id")
    return tuple(sorted(set(ids)))


def rope(fields: Fields, head_dim: int, max_position: int, partial: float = 1.0) -> RopeConfig:
    """`rope_parameters` (transformers ≥ 5), or `rope_scaling` beside `rope_theta`. `partial`: the part of a head that
    rotates where the fields do not say."""
    scaling = fields.section("rope_parameters") or fields.section("rope_scaling") or Fields(fields.file, {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in _ROPE_SCALINGS:
        raise fields.fail(f"rope scaling {kind!r} is not supported; supported: {', '.join(_ROPE_SCALINGS)}")
    theta = scaling if scaling.get("rope_theta") is not None else fields
    part = scaling if scaling.get("partial_rotary_factor") is not None else fields
    rotary_dim = int(head_dim * part.number("partial_rotary_factor", partial))
    plain = RopeConfig(theta=theta.number("rope_theta", 10000.0), rotary_dim=rotary_dim)
    if kind == "default":
        return plain
    scaled = replace(
        plain,
        scaling=kind,
        factor=scaling.number("factor"),
        original_max_position=scaling.integer(
            "original_max_position_embeddings", *(() if kind == "llama3" else (max_position,))
        ),
    )
    if kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        return replace(scaled, low_freq_factor=low, high_freq_factor=high)
    return _yarn(scaling, scaled) if kind == "yarn" else scaled


def _yarn(scaling: Fields, rope: RopeConfig) -> RopeConfig:
    """The magnitude is mscale(factor, mscale) / mscale(factor, mscale_all_dim) where both are given, as DeepSeek does."""
    magnitude = yarn_mscale(rope.factor, 1.0)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        part, whole = (yarn_mscale(rope.factor, scaling.number(n)) for n in ("mscale", "mscale_all_dim"))
        magnitude = part / whole
    return replace(
        rope,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        whole_bounds=scaling.flag("truncate", True),
        magnitude=scaling.number("attention_factor", magnitude),
    )


def yarn_mscale(factor: float, mscale: float) -> float:
    """How much larger scores get with a context `factor` times as long (arXiv:2309.00071)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def longest(max_position: int, rope: RopeConfig) -> int:
    """Positions that the scaled rope reaches: `max_position_embeddings` may name those before scaling."""
    if rope.scaling in ("dynamic", "yarn"):
        return max(max_position, int(rope.original_max_position * rope.factor))
    return max_position


def validated(config: ModelConfig, fields: Fields) -> ModelConfig:
    """The config itself. Raises CheckpointError where its sizes cannot belong together."""
    a, r = config.attention, config.attention.rope
    widest = max(a.head_dim, a.latent.cached if a.latent else 0)
    wrong = [
        (config.layers > MAX_LAYERS, f"at most {MAX_LAYERS} layers expected, found {config.layers}"),
        (
            config.experts is not None and config.experts.count * config.layers > MAX_EXPERTS,
            f"at most {MAX_EXPERTS} experts in all layers expected, found more",
        ),
        (a.heads % a.kv_heads, f"{a.heads} attention heads cannot be shared by {a.kv_heads} key-value heads"),
        (a.head_dim % 2 or not a.head_dim, f"an even head size expected, found {a.head_dim}"),
        (widest > MAX_HEAD, f"heads and latents of at most {MAX_HEAD} values expected, found {widest}"),
        (a.logn_length == 1, "a trained length of at least 2 expected for log-n attention, found 1"),
        (not config.feed_forward.intermediate, "a feed-forward width of at least 1 expected, found 0"),
        (
            config.max_position > MAX_POSITIONS,
            f"at most {MAX_POSITIONS} positions expected, found {config.max_position}",
        ),
        (
            r.rotary_dim % 2 or not 0 <= r.rotary_dim <= a.head_dim,
            f"an even rotary size of at most {a.head_dim} (the head size) expected, found {r.rotary_dim}",
        ),
        (
            a.latent is not None and r.rotary_dim != a.latent.rotary,
            f"all {a.latent.rotary if a.latent else 0} values of the latent's key expected to rotate, found {r.rotary_dim}",
        ),
        (r.theta <= 1, f"rope_theta: a number > 1 expected, found {r.theta:g}"),
        (
            r.scaling == "llama3" and r.low_freq_factor >= r.high_freq_factor,
            f"rope scaling: low_freq_factor {r.low_freq_factor} must be below {r.high_freq_factor}, high_freq_factor",
        ),
        (
            any(i >= config.vocab for i in config.eos_token_ids),
            f"eos_token_id: ids below the vocabulary's {config.vocab} expected, found {list(config.eos_token_ids)}",
        ),
    ]
    for bad, message in wrong:
        if bad:
            raise CheckpointError(str(fields.file), message)
    return config
