"""Published models by their sizes alone: a decoder read from each config.json has as many parameters as the release."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flm.worker.canonical import decoder_tensors
from flm.worker.families.registry import read_config


def llama(
    architecture: str, hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int, **more: Any
) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv, "intermediate_size": inner, "vocab_size": vocab}
    return {"architectures": [architecture + "ForCausalLM"], **sizes, **more}


def qwen(hidden: int, layers: int, heads: int, inner: int, vocab: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"intermediate_size": inner, "vocab_size": vocab, "kv_channels": 128, "seq_length": 8192}
    return {"architectures": ["QWenLMHeadModel"], **sizes}


def chatglm(layers: int, vocab: int) -> dict[str, Any]:
    sizes = {"hidden_size": 4096, "num_layers": layers, "num_attention_heads": 32, "kv_channels": 128}
    sizes |= {"ffn_hidden_size": 13696, "padded_vocab_size": vocab, "seq_length": 8192}
    sizes |= {"multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True}
    return {"architectures": ["ChatGLMModel"], **sizes}


RELEASES: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7b": (llama("Llama", 4096, 32, 32, 32, 11008, 32000), 6738415616),
    "Llama-2-70b": (llama("Llama", 8192, 80, 64, 8, 28672, 32000), 68976648192),
    "Llama-3-8B": (llama("Llama", 4096, 32, 32, 8, 14336, 128256), 8030261248),
    "Yi-34B": (llama("Llama", 7168, 60, 56, 8, 20480, 64000), 34388917248),
    "deepseek-coder-6.7b": (llama("Llama", 4096, 32, 32, 32, 11008, 32256), 6740512768),
    "Qwen1.5-1.8B": (llama("Qwen2", 2048, 24, 16, 16, 5504, 151936), 1836828672),
    "Qwen2-0.5B": (llama("Qwen2", 896, 24, 14, 2, 4864, 151936, tie_word_embeddings=True), 494032768),
    "Qwen2-7B": (llama("Qwen2", 3584, 28, 28, 4, 18944, 152064), 7615616512),
    "Qwen2-72B": (llama("Qwen2", 8192, 80, 64, 8, 29568, 152064), 72706203648),
    "Qwen3-0.6B": (
        llama("Qwen3", 1024, 28, 16, 8, 3072, 151936, head_dim=128, tie_word_embeddings=True),
        596049920,
    ),
    "Qwen3-8B": (llama("Qwen3", 4096, 36, 32, 8, 12288, 151936, head_dim=128), 8190735360),
    "internlm2-chat-7b": (llama("InternLM2", 4096, 32, 32, 8, 14336, 92544), 7737708544),
    "Baichuan-7B": (llama("BaiChuan", 4096, 32, 32, 32, 11008, 64000), 7000559616),
    "Baichuan-13B": (llama("Baichuan", 5120, 40, 40, 40, 13696, 64000), 13264901120),
    "Baichuan2-13B": (llama("Baichuan", 5120, 40, 40, 40, 13696, 125696), 13896668160),
    "MiniCPM-2B": (llama("MiniCPM", 2304, 40, 36, 36, 5760, 122753), 2724880896),
    "Qwen-1_8B": (qwen(2048, 24, 16, 11008, 151936), 1836828672),
    "Qwen-7B": (qwen(4096, 32, 32, 22016, 151936), 7721324544),
    "chatglm2-6b": (chatglm(28, 65024), 6243584000),
    "glm-4-9b-chat": (chatglm(40, 151552), 9399951360),
    "bloom-7b1": (
        {
            "architectures": ["BloomForCausalLM"],
            "n_embed": 4096,
            "n_layer": 30,
            "n_head": 32,
            "vocab_size": 250880,
        },
        7069016064,
    ),
    "rwkv-4-169m": (
        {
            "architectures": ["RwkvForCausalLM"],
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "vocab_size": 50277,
        },
        169342464,
    ),
}


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_has_its_parameters(name: str, tmp_path: Path) -> None:
    config, parameters = RELEASES[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = decoder_tensors(read_config(tmp_path)[0]).values()
    assert sum(math.prod(tensor.shape) for tensor in tensors) == parameters
