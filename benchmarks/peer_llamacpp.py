"""llama.cpp's speed on one GGUF through xllamacpp's in-process server; prints one JSON object.

Usage (in an environment with xllamacpp): python benchmarks/peer_llamacpp.py MODEL.gguf [--runs N] [--threads N]

The three figures are those of bench_engine.py, by the same definitions:
  decode_1      tokens/s of one sequence after its first token (llama.cpp's own timing)
  decode_16     tokens/s of 16 sequences started together, all tokens over the wall time of the batch
  prefill_512   prompt tokens/s of a 512-token prompt (llama.cpp's own timing)
Prompts are token ids made from a seed; the prompt cache and speculation are off, end of sequence is ignored.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp

SHORT, PROMPT, NEW, BATCH = 8, 512, 128, 16
FIRST_ID, LAST_ID = 100, 40000  # ordinary tokens of SmolLM2's vocabulary


def prompt_ids(length: int, seed: int) -> list[int]:
    """The same ids as bench_engine.prompt_ids for the same arguments."""
    draw = random.Random(seed)
    return [draw.randrange(FIRST_ID, LAST_ID) for _ in range(length)]


def serve(path: str, threads: int, parallel: int) -> Any:
    """A server in this process with `parallel` slots of 1,024 tokens each."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel, params.n_ctx = parallel, 1024 * parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_prompt, params.cache_ram_mib, params.n_ctx_checkpoints = False, 0, 0
    params.fit_params, params.verbosity = False, -1
    return xllamacpp.Server(params)


def complete(server: Any, ids: list[int], new: int) -> dict[str, Any]:
    """One greedy completion; returns llama.cpp's timings."""
    body = {
        "prompt": ids,
        "n_predict": new,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "return_tokens": True,
    }
    answer = server.handle_completions(body)
    timings = (answer if isinstance(answer, dict) else json.loads(answer))["timings"]
    if timings["predicted_n"] != new or timings["prompt_n"] != len(ids):
        raise SystemExit(f"llama.cpp did not do the work asked for: {timings}")
    return dict(timings)


def decode_one(server: Any, seed: int) -> float:
    return float(complete(server, prompt_ids(SHORT, seed), NEW)["predicted_per_second"])


def decode_many(server: Any, seed: int) -> float:
    prompts = [prompt_ids(SHORT, seed * BATCH + i) for i in range(BATCH)]
    with ThreadPoolExecutor(BATCH) as pool:
        start = time.perf_counter()
        done = list(pool.map(lambda ids: complete(server, ids, NEW), prompts))
        return len(done) * NEW / (time.perf_counter() - start)


def prefill(server: Any, seed: int) -> float:
    return float(complete(server, prompt_ids(PROMPT, seed), 1)["prompt_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    single = serve(args.model, args.threads, 1)
    cases = {"decode_1": (decode_one, single), "prefill_512": (prefill, single)}
    figures: dict[str, float] = {}
    for name, (measure, server) in cases.items():
        measure(server, args.seed)  # warm-up
        figures[name] = statistics.median(measure(server, args.seed + 1 + i) for i in range(args.runs))
    del single, server, cases
    many = serve(args.model, args.threads, BATCH)
    decode_many(many, args.seed)
    figures["decode_16"] = statistics.median(decode_many(many, args.seed + 1 + i) for i in range(args.runs))
    print(json.dumps({"engine": f"xllamacpp {xllamacpp.__version__}", "model": args.model, **figures}))


if __name__ == "__main__":
    main()
