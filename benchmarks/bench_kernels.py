"""GFLOP/s and GB/s of the CPU kernels at SmolLM2-135M's shapes.

    python benchmarks/bench_kernels.py [--threads N] [--tokens 1,2,4,8,16,64,512] [--only linear,attention,model,small,sample]

Medians of repeated runs, so that a busy machine spoils less. Weights of the linear rows are cycled through 160 MB, so that
they come from memory as in a model and not from cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from flm.kernels.backend import SamplingBatch
from flm.kernels.cpu.backend import CpuBackend
from flm.kernels.quant import QuantizedMatrix

HIDDEN, INNER, HEADS, KV, DIM, VOCAB, LAYERS, GROUP = 576, 1536, 9, 3, 64, 49152, 30, 32
SHAPES = {
    "qkv": ((HEADS + 2 * KV) * DIM, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
RNG = np.random.default_rng(0)


def random_matrix(form: str, n: int, k: int) -> QuantizedMatrix:
    """Random codes, plausible scales."""
    bits = {"int4": 4, "int8": 8}[form]
    codes = RNG.integers(0, 256, (n, k * bits // 8), dtype=np.uint8)
    scales = (RNG.random((n, k // GROUP)) * 0.01).astype(np.float16)
    if form == "int4":
        return QuantizedMatrix(
            "int4", (n, k), codes, GROUP, scales, (-7.5 * scales.astype(np.float32)).astype(np.float16)
        )
    return QuantizedMatrix("int8", (n, k), codes.view(np.int8), GROUP, scales)


def seconds(call: Callable[[], None], budget: float = 0.4) -> float:
    """Median time of a call."""
    call()
    times: list[float] = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def line(name: str, tokens: int, took: float, flops: float, nbytes: float) -> None:
    print(
        f"{name:28} {tokens:5} {took * 1e6:10.1f} µs {flops / took / 1e9:8.1f} GFLOP/s {nbytes / took / 1e9:7.1f} GB/s"
    )


def bench_linear(backend: CpuBackend, tokens: list[int]) -> None:
    for name, form, (n, k) in [
        *((s, "int4", v) for s, v in SHAPES.items()),
        ("lm_head", "int8", (VOCAB, HIDDEN)),
    ]:
        matrix = backend.pack(random_matrix(form, n, k))
        copies = [matrix] + [
            backend.pack(random_matrix(form, n, k)) for _ in range(max(0, int(160e6 / matrix.nbytes) - 1))
        ]
        for t in tokens:
            x, out = floats(t, k), backend.empty((t, n))
            used = copies if t <= 64 else copies[:2]
            with backend.capture() as graph:
                for packed in used:
                    backend.linear(x, packed, out)
            took = seconds(graph.replay) / len(used)
            line(f"linear {form} {name} {n}x{k}", t, took, 2.0 * t * n * k, matrix.nbytes)


def bench_attention(backend: CpuBackend, tokens: list[int]) -> None:
    blocks, size = 160, 32
    for dtype in (np.float32, np.float16):
        cache = backend.kv_caches(1, blocks, size, KV, DIM, dtype)[0]
        cache.k[...], cache.v[...] = floats(*cache.k.shape), floats(*cache.v.shape)
        for t, context in [
            *((t, 512) for t in tokens if t <= 16),
            *((t, 2048) for t in tokens if t == 1),
            (512, 512),
        ]:
            prefill = t == 512
            tables = np.tile(RNG.permutation(blocks).astype(np.int32), (t, 1))
            index = np.zeros(t, np.int32) if prefill else np.arange(t, dtype=np.int32)
            positions = np.arange(t, dtype=np.int32) if prefill else np.full(t, context - 1, np.int32)
            q, out = floats(t, HEADS, DIM), backend.empty((t, HEADS, DIM))
            with backend.capture() as graph:
                backend.paged_attention(q, cache, tables, index, positions, 0.125, out)
            total = float((positions.astype(np.int64) + 1).sum())
            took = seconds(graph.replay)
            name = f"attention {np.dtype(dtype).name} {'prefill' if prefill else f'ctx {context}'}"
            line(name, t, took, 4 * total * HEADS * DIM, 2 * total * KV * DIM * np.dtype(dtype).itemsize)


def bench_small(backend: CpuBackend, tokens: list[int]) -> None:
    cache = backend.kv_caches(1, 64, 32, KV, DIM)[0]
    cos, sin, weight = floats(2048, DIM // 2), floats(2048, DIM // 2), floats(HIDDEN)
    for t in tokens:
        x, _delta, out = floats(t, HIDDEN), floats(t, HIDDEN), backend.empty((t, HIDDEN))
        gate_up, act, qkv = floats(t, 2 * INNER), backend.empty((t, INNER)), floats(t, (HEADS + 2 * KV) * DIM)
        slots, q = np.arange(t, dtype=np.int32), backend.empty((t, HEADS, DIM))
        calls: dict[str, Callable[[], None]] = {
            "rms_norm": partial(backend.rms_norm, x, weight, 1e-5, out),
            "silu_mul": partial(backend.silu_mul, gate_up, act),
            "rope_kv_write": partial(backend.rope_kv_write, qkv, slots, slots, cos, sin, cache, q),
        }
        for name, call in calls.items():
            with backend.capture() as graph:
                for _ in range(20):
                    call()
            elements = {"rms_norm": 2 * x.size, "silu_mul": 3 * act.size, "rope_kv_write": 2 * qkv.size}[name]
            line(name, t, seconds(graph.replay, 0.1) / 20, elements, 4 * elements)


def bench_sample(backend: CpuBackend, tokens: list[int]) -> None:
    for vocab in (VOCAB, 151936):
        for rows in (1, 16):
            logits, ids, values = (
                floats(rows, vocab) * 3,
                np.zeros(rows, np.int32),
                np.zeros(rows, np.float32),
            )
            greedy = SamplingBatch.greedy(rows)
            warm = replace(greedy, temperature_S=np.ones(rows, np.float32))
            top = replace(warm, top_k_S=np.full(rows, 50, np.int32), top_p_S=np.full(rows, 0.9, np.float32))
            for name, batch in {"greedy": greedy, "temperature": warm, "top_k top_p": top}.items():
                took = seconds(partial(backend.sample, logits, batch, ids, values), 0.2)
                line(f"sample {name} {vocab}", rows, took, logits.size, logits.nbytes)


def bench_model(backend: CpuBackend, tokens: list[int]) -> None:
    """All of a decoder step of 30 layers with random weights, each token its own sequence at context 128."""
    layers = [{s: backend.pack(random_matrix("int4", *v)) for s, v in SHAPES.items()} for _ in range(LAYERS)]
    head, weight = backend.pack(random_matrix("int8", VOCAB, HIDDEN)), np.ones(HIDDEN, np.float32)
    cos, sin = floats(2048, DIM // 2), floats(2048, DIM // 2)
    for t in tokens:
        prefill = t >= 64
        blocks = 16 if prefill else 8
        caches = backend.kv_caches(LAYERS, blocks * (1 if prefill else t), 32, KV, DIM, np.float16)
        tables = np.arange(blocks * (1 if prefill else t), dtype=np.int32).reshape(-1, blocks)
        index = np.zeros(t, np.int32) if prefill else np.arange(t, dtype=np.int32)
        positions = np.arange(t, dtype=np.int32) if prefill else np.full(t, 127, np.int32)
        slots = positions + (0 if prefill else np.arange(t, dtype=np.int32) * 32 * blocks)
        slots = slots.astype(np.int32)
        x, h, delta, qkv = (
            floats(t, HIDDEN),
            floats(t, HIDDEN),
            floats(t, HIDDEN),
            floats(t, SHAPES["qkv"][0]),
        )
        q, o, gate_up, act = (
            floats(t, HEADS, DIM),
            floats(t, HEADS, DIM),
            floats(t, 2 * INNER),
            floats(t, INNER),
        )
        rows = 1 if prefill else t
        last, logits, at = floats(rows, HIDDEN), floats(rows, VOCAB), np.arange(rows, dtype=np.int32)
        batch, ids, values = SamplingBatch.greedy(rows), np.zeros(rows, np.int32), np.zeros(rows, np.float32)
        with backend.capture() as graph:
            backend.embedding(head, index, x)
            for layer, cache in zip(layers, caches, strict=True):
                backend.add_rms_norm(x, delta, weight, 1e-5, h)
                backend.linear(h, layer["qkv"], qkv)
                backend.rope_kv_write(qkv, positions, slots, cos, sin, cache, q)
                backend.paged_attention(q, cache, tables, index, positions, 0.125, o)
                backend.linear(o.reshape(t, -1), layer["o"], delta)
                backend.add_rms_norm(x, delta, weight, 1e-5, h)
                backend.linear(h, layer["gate_up"], gate_up)
                backend.silu_mul(gate_up, act)
                backend.linear(act, layer["down"], delta)
            backend.take_rows(x, at, last)
            backend.linear(last, head, logits)
            backend.sample(logits, batch, ids, values)
        took = seconds(graph.replay, 1.0)
        macs = LAYERS * sum(n * k for n, k in SHAPES.values()) * t + rows * VOCAB * HIDDEN
        nbytes = sum(m.nbytes for layer in layers for m in layer.values()) + head.nbytes
        line(f"model step, {t / took:.0f} tokens/s", t, took, 2.0 * macs, nbytes)


BENCHES = {
    "linear": bench_linear,
    "attention": bench_attention,
    "small": bench_small,
    "sample": bench_sample,
    "model": bench_model,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", default="1,2,4,8,16,64,512")
    parser.add_argument("--only", default=",".join(BENCHES))
    options = parser.parse_args()
    backend = CpuBackend(options.threads)
    for name in options.only.split(","):
        BENCHES[name](backend, [int(t) for t in options.tokens.split(",")])


if __name__ == "__main__":
    main()
