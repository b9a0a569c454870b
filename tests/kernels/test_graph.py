"""A captured program does what the eager ops do."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from flm.kernels.errors import KernelError
from flm.kernels.quant import quantize


def step(backend, packed, arrays, cache):
    """A layer in little: every compute op once."""
    a = arrays
    backend.embedding(packed["embed"], a["ids"], a["x"])
    backend.rms_norm(a["x"], a["norm"], 1e-5, a["h"])
    backend.linear(a["h"], packed["qkv"], a["qkv"])
    backend.rope_kv_write(a["qkv"], a["positions"], a["slots"], a["cos"], a["sin"], cache, a["q"])
    backend.paged_attention(a["q"], cache, a["tables"], a["index"], a["positions"], 0.25, a["attended"])
    backend.linear(a["attended"].reshape(len(a["ids"]), -1), packed["o"], a["delta"])
    backend.add_rms_norm(a["x"], a["delta"], a["norm"], 1e-5, a["h"])
    backend.linear(a["h"], packed["up"], a["gate_up"])
    backend.silu_mul(a["gate_up"], a["act"])
    backend.linear(a["act"], packed["down"], a["x"], accumulate=True)
    backend.take_rows(a["x"], a["rows"], a["last"])
    backend.linear(a["last"], packed["embed"], a["logits"])


def make(backend, rng, tokens=5, hidden=64, heads=4, kv=2, dim=16, inner=96, vocab=100):
    sizes = {"embed": (vocab, hidden), "qkv": ((heads + 2 * kv) * dim, hidden), "o": (hidden, heads * dim)}
    sizes |= {"up": (2 * inner, hidden), "down": (hidden, inner)}
    packed = {
        n: backend.pack(quantize(rng.standard_normal(s).astype(np.float32) / 8, "int4"))
        for n, s in sizes.items()
    }
    shapes = {"x": (tokens, hidden), "h": (tokens, hidden), "qkv": (tokens, (heads + 2 * kv) * dim)}
    shapes |= {"q": (tokens, heads, dim), "attended": (tokens, heads, dim), "delta": (tokens, hidden)}
    shapes |= {
        "gate_up": (tokens, 2 * inner),
        "act": (tokens, inner),
        "last": (1, hidden),
        "logits": (1, vocab),
    }
    arrays = {name: backend.empty(shape) for name, shape in shapes.items()}
    arrays |= {"norm": np.ones(hidden, np.float32), "ids": rng.integers(0, vocab, tokens).astype(np.int32)}
    arrays |= {
        "positions": np.arange(tokens, dtype=np.int32),
        "slots": np.arange(tokens, dtype=np.int32) + 16,
    }
    arrays |= {"cos": rng.random((64, dim // 2), np.float32), "sin": rng.random((64, dim // 2), np.float32)}
    arrays |= {"tables": np.array([[1, 0]], np.int32), "index": np.zeros(tokens, np.int32)}
    arrays |= {"rows": np.array([tokens - 1], np.int32)}
    return packed, arrays, backend.kv_caches(1, 4, 16, kv, dim)[0]


@pytest.mark.parametrize("which", ["cpu", "cpu1", "exact"])
def test_replay_equals_eager(request, which, rng):
    backend = request.getfixturevalue(which)
    packed, arrays, cache = make(backend, rng)
    step(backend, packed, arrays, cache)
    first = arrays["logits"].copy()
    arrays["logits"][...] = np.nan
    with backend.capture() as graph:
        step(backend, packed, arrays, cache)
    assert np.isnan(arrays["logits"]).all()  # recorded, not run
    graph.replay()
    assert np.array_equal(arrays["logits"], first)
    arrays["ids"][...] = arrays["ids"][::-1].copy()
    graph.replay()
    again = arrays["logits"].copy()
    step(backend, packed, arrays, cache)
    assert np.array_equal(arrays["logits"], again) and not np.array_equal(again, first)


def test_graph_keeps_its_arrays(cpu, rng):
    packed, arrays, cache = make(cpu, rng)
    step(cpu, packed, arrays, cache)
    logits, first = arrays["logits"], arrays["logits"].copy()
    with cpu.capture() as graph:
        step(cpu, packed, arrays, cache)
    del packed, arrays, cache
    gc.collect()
    spoil = [np.full(1 << 12, np.nan, np.float32) for _ in range(50)]
    logits[...] = 0
    graph.replay()
    assert np.array_equal(logits, first) and spoil


def test_capture_does_not_nest(cpu):
    with cpu.capture(), pytest.raises(KernelError), cpu.capture():
        pass


def test_matches_the_reference(cpu, exact, rng):
    results = []
    for backend in (cpu, exact):
        packed, arrays, cache = make(backend, np.random.default_rng(4))
        step(backend, packed, arrays, cache)
        results.append(arrays["logits"].copy())
    assert np.allclose(*results, rtol=1e-4, atol=1e-4)
