"""Small Llama checkpoints in any packing, and the same weights as floats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packers
from safetensors_writer import write_safetensors

HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE, VOCAB, LAYERS = 256, 4, 64, 384, 96, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
MATRICES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (2 * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (2 * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
METHODS = {"gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}}
METHODS |= {"awq": {"quant_method": "awq", "bits": 4, "group_size": 64}}
METHODS |= {"fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
METHODS |= {"compressed": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}


def gptq_ordered(
    rng: np.random.Generator, k_orders: dict[str, Any], name: str, n: int, k: int
) -> packers.Layer:
    """Layers that share their input share its order, as GPTQ makes it."""
    order = k_orders.setdefault(
        name if "o_proj" in name or "down" in name else name.split(".")[0], rng.permutation(k)
    )
    return packers.gptq(rng, n, k, 64, order=order)


def drawing(name: str) -> Callable[[str, int, int], packers.Layer]:
    rng, orders = np.random.default_rng(5), dict[str, Any]()
    draws: dict[str, Callable[[str, int, int], packers.Layer]] = {
        "gptq": lambda module, n, k: gptq_ordered(rng, orders, module, n, k),
        "awq": lambda module, n, k: packers.awq(rng, n, k, 64),
        "fp8": lambda module, n, k: packers.fp8(rng, n, k),
        "compressed": lambda module, n, k: packers.compressed(rng, n, k, 64, sym=False),
        "gptq apart": lambda module, n, k: packers.gptq(rng, n, k, 64, order=rng.permutation(k)),
    }
    return draws[name]


def write_model(
    target: Path, draw: Callable[[str, int, int], packers.Layer], extra: dict[str, Any]
) -> tuple[Path, Path]:
    """(packed, floats): directories with a model whose layers' matrices are draw(name, N, K); `extra` goes to the packed
    config.json."""
    rng = np.random.default_rng(9)
    shared = {
        "model.embed_tokens.weight": rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32),
        "lm_head.weight": rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32) / 16,
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    packed, floats, dtypes = dict(shared), dict(shared), {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            packed[f"{prefix}{norm}.weight"] = floats[f"{prefix}{norm}.weight"] = np.ones(HIDDEN, np.float32)
        for name, (n, k) in MATRICES.items():
            tensors, meant = draw(name, n, k)
            packed |= {f"{prefix}{name}.{part}": values for part, values in tensors.items()}
            floats[f"{prefix}{name}.weight"] = meant
            if tensors.get("weight", meant).dtype == np.uint8:
                dtypes[f"{prefix}{name}.weight"] = "F8_E4M3"
    places = target / "packed", target / "floats"
    for place, tensors, config in zip(places, (packed, floats), (CONFIG | extra, CONFIG), strict=True):
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(config))
        write_safetensors(place / "model.safetensors", tensors, dtypes if place.name == "packed" else {})
    return places
