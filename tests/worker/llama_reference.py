"""An independent Llama: plain NumPy in float64, written from the formulas, sharing no code with flm.

RMSNorm (arXiv:1910.07467), rotary positions (arXiv:2104.09864), grouped-query attention (arXiv:2305.13245), SwiGLU
(arXiv:2002.05202). Weights are kept as float32 under Hugging Face's names and widened where they are used.

Shape legend: T new tokens, P all tokens so far, E hidden, H query heads, J KV heads, D head width, V vocabulary.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.numpy import load_file

F64 = NDArray[np.float64]


@dataclass
class LlamaReference:
    """One model. logits(ids) continues where the last call stopped; reset() forgets all tokens."""

    weights: dict[str, NDArray[np.float32]]
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    inv_freq: F64  # [D / 2]
    _cache: list[tuple[F64, F64]] = field(default_factory=list)
    _length: int = 0

    def reset(self) -> None:
        self._cache, self._length = [], 0

    def logits(self, ids: list[int]) -> F64:
        """[T, V] of the tokens `ids`, seen after all tokens of earlier calls."""
        x_TE = self.weights["model.embed_tokens.weight"][ids].astype(np.float64)
        for layer in range(self.layers):
            p = f"model.layers.{layer}."
            x_TE = x_TE + self._attention(p, layer, self._norm(p + "input_layernorm", x_TE))
            h_TE = self._norm(p + "post_attention_layernorm", x_TE)
            gate, up = self._linear(p + "mlp.gate_proj", h_TE), self._linear(p + "mlp.up_proj", h_TE)
            x_TE = x_TE + self._linear(p + "mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
        self._length += len(ids)
        head = "lm_head" if "lm_head.weight" in self.weights else "model.embed_tokens"
        return self._linear(head, self._norm("model.norm", x_TE))

    def _norm(self, name: str, x_TE: F64) -> F64:
        return (
            x_TE / np.sqrt((x_TE**2).mean(axis=1, keepdims=True) + self.eps) * self.weights[name + ".weight"]
        )

    def _linear(self, name: str, x: F64) -> F64:
        y = x @ self.weights[name + ".weight"].T.astype(np.float64)
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def _attention(self, prefix: str, layer: int, h_TE: F64) -> F64:
        split = lambda name: self._linear(f"{prefix}self_attn.{name}", h_TE).reshape(
            len(h_TE), -1, self.head_dim
        )
        q_THD, k_TJD, v_TJD = self._rotate(split("q_proj")), self._rotate(split("k_proj")), split("v_proj")
        if layer < len(self._cache):
            old_k, old_v = self._cache[layer]
            k_PJD, v_PJD = np.concatenate([old_k, k_TJD]), np.concatenate([old_v, v_TJD])
            self._cache[layer] = k_PJD, v_PJD
        else:
            k_PJD, v_PJD = k_TJD, v_TJD
            self._cache.append((k_PJD, v_PJD))
        out_THD = np.empty_like(q_THD)
        mask_TP = np.arange(len(k_PJD))[None, :] > self._length + np.arange(len(h_TE))[:, None]
        for h in range(self.heads):
            j = h // (self.heads // self.kv_heads)
            scores_TP = q_THD[:, h] @ k_PJD[:, j].T / math.sqrt(self.head_dim)
            scores_TP[mask_TP] = -np.inf
            weights_TP = np.exp(scores_TP - scores_TP.max(axis=1, keepdims=True))
            out_THD[:, h] = weights_TP / weights_TP.sum(axis=1, keepdims=True) @ v_PJD[:, j]
        return self._linear(prefix + "self_attn.o_proj", out_THD.reshape(len(h_TE), -1))

    def _rotate(self, x_THD: F64) -> F64:
        """Each pair (i, i + D / 2) as a complex number, turned by its angle."""
        half = self.head_dim // 2
        angles = (self._length + np.arange(len(x_THD)))[:, None] * self.inv_freq
        turned = (x_THD[..., :half] + 1j * x_THD[..., half:]) * np.exp(1j * angles)[:, None, :]
        return np.concatenate([turned.real, turned.imag], axis=-1)


def scaled_frequencies(head_dim: int, theta: float, scaling: dict[str, Any]) -> F64:
    """Angles per position, float64 [D / 2], for the scalings default, linear and llama3 (as Meta published it)."""
    out = []
    for i in range(head_dim // 2):
        f = theta ** (-2 * i / head_dim)
        kind = scaling.get("rope_type", "default")
        if kind == "linear":
            f /= scaling["factor"]
        elif kind == "llama3":
            wavelength = 2 * math.pi / f
            old, low, high = (
                scaling[k]
                for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
            )
            if wavelength > old / low:
                f /= scaling["factor"]
            elif wavelength >= old / high:
                smooth = (old / wavelength - low) / (high - low)
                f = (1 - smooth) * f / scaling["factor"] + smooth * f
        out.append(f)
    return np.array(out)


def from_directory(directory: Path) -> LlamaReference:
    """A Hugging Face directory written by transformers ≥ 5."""
    c = json.loads((directory / "config.json").read_text())
    rope = c["rope_parameters"]
    return LlamaReference(
        weights=load_file(directory / "model.safetensors"),
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        eps=c["rms_norm_eps"],
        inv_freq=scaled_frequencies(c["head_dim"], rope["rope_theta"], rope),
    )


_GGUF_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def gguf_weights(tensors: list[ReaderTensor], heads: int, kv_heads: int) -> dict[str, NDArray[np.float32]]:
    """Tensors of a llama GGUF, dequantised by the `gguf` package, q and k rows back in rotate-half order."""
    weights = {}
    for tensor in tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        values = dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
        part, kind = tensor.name.rsplit(".", 1)
        if part in _GGUF_TOP:
            weights[f"{_GGUF_TOP[part]}.{kind}"] = values
            continue
        _, layer, part = part.split(".")
        if part in ("attn_q", "attn_k"):
            n = heads if part == "attn_q" else kv_heads
            values = np.concatenate(
                [np.concatenate([head[0::2], head[1::2]]) for head in np.split(values, n)]
            )
        weights[f"model.layers.{layer}.{_GGUF_PARTS[part]}.{kind}"] = values
    return weights


def from_gguf(path: Path) -> LlamaReference:
    """A llama GGUF without rope scaling."""
    reader = GGUFReader(path)
    get = lambda key: reader.fields["llama." + key].contents()
    heads, kv_heads = get("attention.head_count"), get("attention.head_count_kv")
    head_dim = get("embedding_length") // heads
    return LlamaReference(
        weights=gguf_weights(reader.tensors, heads, kv_heads),
        layers=get("block_count"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=get("attention.layer_norm_rms_epsilon"),
        inv_freq=scaled_frequencies(head_dim, get("rope.freq_base"), {}),
    )
