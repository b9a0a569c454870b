"""Checkpoints of the shapes of published models, whose weights are noise: what loading costs does not depend on them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

BLOCK = 8 << 20
GROUP = 128  # of GPTQ


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    def matrices(self, layers: int) -> dict[str, tuple[int, int]]:
        """[N, K] by Hugging Face's names, in the order of files."""
        kv = self.hidden // self.heads * self.kv_heads
        found = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            for name, n in (("q", self.hidden), ("k", kv), ("v", kv), ("o", self.hidden)):
                found[f"{prefix}self_attn.{name}_proj.weight"] = (n, self.hidden)
            for name in ("gate", "up"):
                found[f"{prefix}mlp.{name}_proj.weight"] = (self.intermediate, self.hidden)
            found[f"{prefix}mlp.down_proj.weight"] = (self.hidden, self.intermediate)
        return found | {"lm_head.weight": (self.vocab, self.hidden)}

    def norms(self, layers: int) -> list[str]:
        names = [
            f"model.layers.{i}.{n}_layernorm.weight"
            for i in range(layers)
            for n in ("input", "post_attention")
        ]
        return [*names, "model.norm.weight"]

    def config(self, layers: int) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"], "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        }  # fmt: skip


LLAMA3_8B = Shape(4096, 14336, 32, 8, 64000)  # half of its vocabulary
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
}  # fmt: skip


def noise(file: BinaryIO, size: int) -> None:
    """Bytes of which any two are a small positive float16, or bfloat16; the same block over and over."""
    block = np.random.default_rng(0).integers(0x20, 0x38, BLOCK, dtype=np.uint8).tobytes()
    file.writelines(block[: min(BLOCK, size - start)] for start in range(0, size, BLOCK))
    file.flush()
    os.fsync(file.fileno())


def write_directory(folder: Path, shape: Shape, layers: int, gptq: bool = False) -> Path:
    """A Hugging Face directory in bfloat16, or with its layers as GPTQ int4."""
    folder.mkdir()
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (n, k) in shape.matrices(layers).items():
        if gptq and "layers" in name:
            stem = name.removesuffix("weight")
            tensors[stem + "qweight"] = "I32", (k // 8, n)
            tensors[stem + "qzeros"] = "I32", (k // GROUP, n // 8)
            tensors[stem + "scales"] = "F16", (k // GROUP, n)
        else:
            tensors[name] = "BF16", (n, k)
    tensors |= dict.fromkeys(shape.norms(layers), ("BF16", (shape.hidden,)))
    header, at = {}, 0
    for name, (dtype, sizes) in tensors.items():
        size = prod(sizes) * (4 if dtype == "I32" else 2)
        header[name] = {"dtype": dtype, "shape": list(sizes), "data_offsets": [at, at + size]}
        at += size
    config = shape.config(layers)
    if gptq:
        config["quantization_config"] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
        }
    (folder / "config.json").write_text(json.dumps(config))
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        noise(file, at)
    return folder


def write_gguf(path: Path, shape: Shape, layers: int, kind: str) -> Path:
    """A llama GGUF whose matrices are all of one type, such as Q4_K."""
    writer = GGUFWriter(path, "llama")
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_context_length(256)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    block, block_bytes = {"Q4_1": (32, 20), "Q4_K": (256, 144), "Q8_0": (32, 34)}[kind]
    total, raw = 0, GGMLQuantizationType[kind]
    for name, (n, k) in shape.matrices(layers).items():
        row = k // block * block_bytes
        writer.add_tensor_info(_gguf_name(name), (n, row), np.dtype(np.uint8), n * row, raw_dtype=raw)
        total += n * row
    for name in shape.norms(layers):
        writer.add_tensor_info(_gguf_name(name), (shape.hidden,), np.dtype(np.float32), shape.hidden * 4)
        total += shape.hidden * 4
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        noise(file, total + -file.tell() % 32)
    return path


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return GGUF_NAMES[stem] + ".weight"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"
