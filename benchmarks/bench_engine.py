"""This engine's speed on one model, as a library: no Ray, no gRPC; prints one JSON object.

Usage: python benchmarks/bench_engine.py MODEL [--runs N] [--threads N]

The figures are those of peer_llamacpp.py, by the same definitions:
  decode_1      tokens/s of one sequence after its first token
  decode_16     tokens/s of 16 sequences started together, all tokens over the wall time of the batch
  prefill_512   prompt tokens/s of a 512-token prompt, to its first token
Prompts are token ids made from a seed, all different, so that the prefix cache finds nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from importlib.metadata import version

from flm.worker import Engine, SamplingParams

SHORT, PROMPT, NEW, BATCH = 8, 512, 128, 16
FIRST_ID, LAST_ID = 100, 40000  # ordinary tokens of SmolLM2's vocabulary


def prompt_ids(length: int, seed: int) -> list[int]:
    """The same ids as peer_llamacpp.prompt_ids for the same arguments."""
    draw = random.Random(seed)
    return [draw.randrange(FIRST_ID, LAST_ID) for _ in range(length)]


def greedy(new: int) -> SamplingParams:
    return SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)


def decode_one(engine: Engine, seed: int) -> float:
    stamps = []
    for event in engine.stream(prompt_ids(SHORT, seed), greedy(NEW)):
        stamps += [time.perf_counter()] * len(event.token_ids)
    return (NEW - 1) / (stamps[-1] - stamps[0])


def decode_many(engine: Engine, seed: int) -> float:
    prompts = [prompt_ids(SHORT, seed * BATCH + i) for i in range(BATCH)]
    start = time.perf_counter()
    done = engine.generate(prompts, greedy(NEW))
    seconds = time.perf_counter() - start
    if [len(completion.token_ids) for completion in done] != [NEW] * BATCH:
        raise SystemExit("the engine did not do the work asked for")
    return BATCH * NEW / seconds


def prefill(engine: Engine, seed: int) -> float:
    start = time.perf_counter()
    for _ in engine.stream(prompt_ids(PROMPT, seed), greedy(1)):
        pass
    return PROMPT / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    figures: dict[str, float] = {}
    with Engine(args.model, threads=args.threads, max_context=1024, max_sequences=BATCH) as engine:
        for name, measure in (("decode_1", decode_one), ("prefill_512", prefill), ("decode_16", decode_many)):
            measure(engine, args.seed)  # warm-up
            figures[name] = statistics.median(measure(engine, args.seed + 1 + i) for i in range(args.runs))
    print(json.dumps({"engine": f"flm-cluster {version('flm-cluster')}", "model": args.model, **figures}))


if __name__ == "__main__":
    main()
