"""Time of single kernels and of whole decode steps on a GPU, against the bytes that they must move.

Weights and caches are random, made on the device: speed depends on shapes alone. Shape legend: M tokens, N outputs,
K inputs, H query heads, J key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from flm.kernels.backend import SamplingBatch
from flm.kernels.cuda import attention, elementwise, linear, rope, sampling
from flm.kernels.cuda.kernel import Device
from flm.kernels.cuda.pack import STEPS, CudaMatrix

Array = Any
Call = Callable[[], None]
Timer = Callable[[list[Call]], float]  # mean seconds of the calls, made one after another


@dataclass(frozen=True)
class Measured:
    """One line of the table. share: of the bandwidth that a copy reaches on this device. teraflops: a second, 0 for what
    does hardly any arithmetic."""

    what: str
    microseconds: float
    gigabytes_per_second: float
    share: float
    teraflops: float = 0.0


def random_matrix(
    device: Device, n: int, k: int, format: str, activation: str, group: int = 128
) -> CudaMatrix:
    """A packed weight [n, k] with arbitrary codes and scales of about 1 / sqrt(k)."""
    tiles = (-(-n // 16), -(-k // (16 * STEPS[format])), 32, 4)
    codes, scales = filled(device, tiles, np.uint32, some_codes(format, activation)), None
    if format != "float":
        shape = (tiles[0], tiles[1] * 16 * STEPS[format] // group, 16, *((2,) if format == "int4" else ()))
        scales = filled(device, shape, np.float16, np.full(1 << 16, k**-0.5 / 8, np.float16))
    return CudaMatrix(
        (n, k), format, activation, codes, scales, 0 if scales is None else group // 16, k, None
    )


@lru_cache(maxsize=4)
def some_codes(format: str, activation: str) -> Array:
    """Numbers that are repeated over weights; for floats with small exponents, so that no sum overflows."""
    some = np.random.default_rng(0).integers(0, 2**32, 1 << 20, np.uint32)
    if format != "float":
        return some
    return (some & np.uint32(0x83FF83FF)) | np.uint32(0x3C003C00 if activation == "bfloat16" else 0x20002000)


def filled(device: Device, shape: tuple[int, ...], dtype: Any, some: Array) -> Array:
    """An array of the device that repeats `some`."""
    out, piece = device.empty(shape, dtype), device.asarray(some)
    flat, size = out.reshape(-1), len(some)
    for start in range(0, len(flat), size):
        flat[start : start + size] = piece[: len(flat) - start]
    return out


def copies_of(make: Callable[[], Any], nbytes: int, enough: int = 256 << 20) -> list[Any]:
    """So many of a thing that going through them leaves nothing of the first in any cache."""
    return [make() for _ in range(max(2, min(64, -(-enough // max(nbytes, 1)))))]


def weights_of(device: Device, n: int, k: int, format: str, activation: str, enough: int) -> list[CudaMatrix]:
    """Copies of a random weight."""
    size = n * k // {"int4": 2, "int8": 1, "fp8": 1, "float": 1}[format] * (2 if format == "float" else 1)
    return copies_of(lambda: random_matrix(device, n, k, format, activation), size, enough)


def linear_calls(device: Device, weights: list[CudaMatrix], m: int) -> tuple[list[Call], int]:
    """Products of m rows with each of some weights alike, and the bytes of one."""
    (n, k), kind = weights[0].shape, weights[0].dtype
    x, out = zeros(device, (m, k), kind), device.empty((m, n), kind)
    calls = [lambda w=w: linear.linear(device, x, w, out) for w in weights]  # type: ignore[misc]
    return calls, weights[0].nbytes + 2 * m * (n + k)


def zeros(device: Device, shape: tuple[int, ...], dtype: Any) -> Array:
    array = device.empty(shape, dtype)
    array[...] = 0
    return array


def attention_calls(
    device: Device,
    batch: int,
    context: int,
    heads: tuple[int, int, int],
    kv: str,
    activation: str,
    enough: int,
) -> tuple[list[Call], int]:
    """Decode steps of `batch` sequences of `context` tokens."""
    (H, J, D), size = heads, 16
    blocks = -(-context // size)
    nbytes = 2 * batch * context * J * (D * (1 if kv == "int8" else 2) + (4 if kv == "int8" else 0))
    caches = copies_of(lambda: rope.kv_cache(device, batch * blocks, size, J, D, kv), nbytes, enough)
    tables = device.asarray(
        np.random.default_rng(0).permutation(batch * blocks).astype(np.int32).reshape(batch, blocks)
    )
    index = device.asarray(np.arange(batch, dtype=np.int32))
    positions = device.asarray(np.full(batch, context - 1, np.int32))
    q, out = zeros(device, (batch, H, D), activation), device.empty((batch, H, D), activation)
    space = attention.attention_space(device, context, batch * H, D)
    return [
        lambda c=c: attention.paged_attention(device, q, c, tables, index, positions, D**-0.5, out, space)  # type: ignore[misc]
        for c in caches
    ], nbytes


def prefill_calls(
    device: Device, tokens: int, before: int, heads: tuple[int, int, int], kv: str, activation: str
) -> tuple[list[Call], int, float]:
    """A chunk of one prompt, `tokens` tokens behind `before` others; also its flops, of the keys that each token sees."""
    (H, J, D), size, context = heads, 16, before + tokens
    blocks = -(-context // size)
    cache = rope.kv_cache(device, blocks, size, J, D, kv)
    tables = device.asarray(np.arange(blocks, dtype=np.int32)[None])
    index = device.asarray(np.zeros(tokens, np.int32))
    positions = device.asarray(np.arange(before, context, dtype=np.int32))
    q, out = zeros(device, (tokens, H, D), activation), device.empty((tokens, H, D), activation)
    space = attention.attention_space(device, context, H, D)
    call = lambda: attention.paged_attention(
        device, q, cache, tables, index, positions, D**-0.5, out, space, decode=False
    )
    seen = tokens * before + tokens * (tokens + 1) / 2
    return [call], cache.nbytes + 4 * tokens * H * D, 4 * seen * H * D


def small_calls(
    device: Device, tokens: int, width: int, activation: str
) -> dict[str, tuple[list[Call], int]]:
    """The fused small ops on `tokens` rows."""
    x, weight = zeros(device, (tokens, width), "float32"), zeros(device, (width,), "float32")
    delta, out = zeros(device, (tokens, width), activation), device.empty((tokens, width), activation)
    both = zeros(device, (tokens, 2 * width), activation)
    return {
        f"add + RMSNorm {tokens}x{width}": (
            [lambda: elementwise.rms_norm(device, x, weight, 1e-5, out, delta)],
            tokens * width * 12,
        ),
        f"SiLU * up {tokens}x{width}": (
            [lambda: elementwise.silu_mul(device, both, out)],
            tokens * width * 6,
        ),
    }


def sampling_calls(
    device: Device, rows: int, vocab: int, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[list[Call], int]:
    """Tokens of `rows` rows of random logits. Nobody asks for log-probabilities."""
    rng = np.random.default_rng(1)
    logits = device.asarray((rng.standard_normal((rows, vocab)) * 3).astype(np.float32))
    batch = SamplingBatch.greedy(rows)
    batch.temperature_S[...], batch.top_k_S[...], batch.top_p_S[...] = temperature, top_k, top_p
    there = sampling.upload(device, batch)
    ids = device.empty((rows,), "int32")
    room = sampling.SamplingSpace(device, rows, vocab)
    call = lambda: sampling.sample(device, logits, there, ids, None, room)
    return [call], rows * vocab * 4


def measure(
    what: str, calls: list[Call], nbytes: int, timer: Timer, copy_rate: float, flops: float = 0.0
) -> Measured:
    """Time the calls; copy_rate in bytes a second, flops of each call."""
    seconds = timer(calls)
    rate = nbytes / seconds
    return Measured(what, seconds * 1e6, rate / 1e9, rate / copy_rate, flops / seconds / 1e12)


def as_rows(results: list[Measured]) -> list[dict[str, Any]]:
    return [asdict(result) for result in results]
