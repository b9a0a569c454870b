"""Small GGUF files for tests, written with the `gguf` package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from safetensors.numpy import load_file

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def interleaved(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rotate-half rows of q or k in the order llama.cpp keeps them: first of each pair beside its second."""
    out = np.empty_like(values)
    for whole, head in zip(np.split(out, heads), np.split(values, heads), strict=True):
        half = len(head) // 2
        whole[0::2], whole[1::2] = head[:half], head[half:]
    return out


def gguf_from_directory(
    directory: Path,
    target: Path,
    kind: Callable[[str], str] = lambda name: "F32",
    edit: Callable[[GGUFWriter], None] = lambda writer: None,
    architecture: str = "llama",
) -> Path:
    """A llama GGUF with the weights of a Hugging Face directory; kind(name) is the type of each matrix."""
    config = json.loads((directory / "config.json").read_text())
    writer = GGUFWriter(target, architecture)
    _add_sizes(writer, config)
    edit(writer)
    for name, values in load_file(directory / "model.safetensors").items():
        if name in TOP:
            raw_name = TOP[name]
        else:
            _, _, layer, *_, stem, suffix = name.split(".")
            raw_name = f"blk.{layer}.{NAMES[stem]}.{suffix}"
            if stem in ("q_proj", "k_proj"):
                heads = config["num_attention_heads" if stem == "q_proj" else "num_key_value_heads"]
                values = interleaved(values, heads)
        add_matrix(writer, raw_name, values, kind(raw_name) if values.ndim == 2 else "F32")
    write(writer)
    return target


def _add_sizes(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])


def add_matrix(writer: GGUFWriter, name: str, values: NDArray[np.float32], kind: str) -> None:
    if kind == "F32":
        writer.add_tensor(name, values)
    elif kind == "F16":
        writer.add_tensor(name, values.astype(np.float16))
    else:
        number = GGMLQuantizationType[kind]
        writer.add_tensor(name, quantize(values, number), raw_dtype=number)


# where blocks of the k-quants keep their half-precision scales
_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def add_packed(
    writer: GGUFWriter, name: str, values: NDArray[np.float32], kind: str, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Add a tensor of that type, of these values or, for the k-quants, which `gguf` does not write, of random blocks. Returns
    what `gguf` reads in it."""
    number = GGMLQuantizationType[kind]
    if kind in _SCALES:
        weights, size = GGML_QUANT_SIZES[number]
        blocks = rng.integers(0, 256, (values.size // weights, size), dtype=np.uint8)
        for at in _SCALES[kind]:
            scales = rng.lognormal(-8, 0.3, (len(blocks), 1)).astype(np.float16)
            blocks[:, at : at + 2] = scales.view(np.uint8)
        raw = blocks.reshape(*values.shape[:-1], -1)
    else:
        raw = quantize(values, number)
    writer.add_tensor(name, raw, raw_dtype=number)
    return np.asarray(dequantize(raw, number), np.float32).reshape(values.shape)


def write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
