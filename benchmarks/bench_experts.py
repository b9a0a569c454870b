"""GFLOP/s and GB/s of experts and of latent attention at DeepSeek-V2-Lite's shapes, int4 weights in groups of 32.

    python benchmarks/bench_experts.py [--threads N] [--tokens 1,8,64,512] [--only experts,attention]

Every token chooses its experts at random, anew in every run, so that weights come from memory. GB/s counts the weights of
chosen experts, and the cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
from bench_kernels import RNG, floats, line, random_matrix, seconds

from flm.kernels.cpu.backend import CpuBackend

HIDDEN, WIDTH, EXPERTS, CHOSEN, HEADS, LATENT, ROTARY, BLOCK = 2048, 1408, 64, 6, 16, 512, 64, 16


def bench_experts(backend: CpuBackend, tokens: list[int]) -> None:
    """One layer's routed experts."""
    pairs = (
        (random_matrix("int4", 2 * WIDTH, HIDDEN), random_matrix("int4", HIDDEN, WIDTH))
        for _ in range(EXPERTS)
    )
    experts = backend.pack_experts(pairs)
    for t in tokens:
        x, out, weights = floats(t, HIDDEN), floats(t, HIDDEN), np.full((t, CHOSEN), 1 / CHOSEN, np.float32)
        ids = np.zeros((t, CHOSEN), np.int32)

        def run(ids=ids, x=x, weights=weights, out=out) -> None:  # type: ignore[no-untyped-def]
            for row in ids:
                row[:] = RNG.choice(EXPERTS, CHOSEN, replace=False)
            backend.expert_mlp(x, experts, ids, weights, out)

        took, active = seconds(run), len(np.unique(ids))
        macs = t * CHOSEN * 3 * HIDDEN * WIDTH
        line(f"experts, {active} chosen", t, took, 2.0 * macs, experts.nbytes * active // EXPERTS)


def bench_attention(backend: CpuBackend, tokens: list[int]) -> None:
    """One layer's attention: up to 16 tokens are sequences of 1024, more are one prompt."""
    for t in tokens:
        prefill, context = t > 16, t if t > 16 else 1024
        blocks, count = -(-context // BLOCK), 1 if prefill else t
        cache = backend.latent_caches(1, count * blocks, BLOCK, LATENT, ROTARY)[0]
        cache.rows[...] = 0.01
        tables = np.arange(count * blocks, dtype=np.int32).reshape(count, blocks)
        index = np.zeros(t, np.int32) if prefill else np.arange(t, dtype=np.int32)
        positions = np.arange(t, dtype=np.int32) if prefill else np.full(t, context - 1, np.int32)
        q, rotated, out = floats(t, HEADS, LATENT), floats(t, HEADS, ROTARY), floats(t, HEADS, LATENT)
        args = q, rotated, cache, tables, index, positions, 0.1, out
        took = seconds(partial(backend.latent_attention, *args))
        macs = int((positions + 1).sum()) * HEADS * (2 * LATENT + ROTARY)
        line(f"latents of {context}", t, took, 2.0 * macs, cache.nbytes)


BENCHES: dict[str, Callable[[CpuBackend, list[int]], None]] = {
    "experts": bench_experts,
    "attention": bench_attention,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--only", default=",".join(BENCHES))
    given = parser.parse_args()
    backend = CpuBackend(threads=given.threads)
    for name in given.only.split(","):
        BENCHES[name](backend, [int(t) for t in given.tokens.split(",")])


if __name__ == "__main__":
    main()
