"""Quantised checkpoints from known integers: writers of the packings that worker/packing reads, written from their
published descriptions and sharing no code with the readers.

Each returns the tensors of one layer, by the names that follow its stem, and the weights that they mean [N, K].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Layer = tuple[dict[str, Array], NDArray[np.float32]]


def words(codes: Array, bits: int, axis: int) -> NDArray[np.int32]:
    """Unsigned codes into 32-bit words along an axis, the first code in the lowest bits, padded with zeros."""
    per = 32 // bits
    codes = np.moveaxis(codes.astype(np.int64), axis, -1)
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)])
    packed = sum(codes[..., i::per] << (bits * i) for i in range(per))
    return np.ascontiguousarray(np.moveaxis(np.asarray(packed), -1, axis)).astype(np.uint32).view(np.int32)


def _meant(codes: Array, zeros: Array, scales: Array, group_of: Array) -> NDArray[np.float32]:
    wide = scales.astype(np.float64)[:, group_of] * (codes.astype(np.float64) - zeros[:, group_of])
    return wide.astype(np.float32)


def _drawn(rng: np.random.Generator, n: int, k: int, groups: int, bits: int) -> tuple[Array, Array, Array]:
    codes, zeros = rng.integers(0, 1 << bits, (n, k)), rng.integers(1, (1 << bits) + 1, (n, groups))
    return codes, zeros, rng.lognormal(-4, 0.5, (n, groups)).astype(np.float16)


def gptq(
    rng: np.random.Generator,
    n: int,
    k: int,
    group: int,
    bits: int = 4,
    v2: bool = False,
    sym: bool = False,
    order: Array | None = None,
    keep_index: bool = True,
) -> Layer:
    """order: a permutation of the inputs, which desc_act quantises in that order."""
    size = k if group < 0 else group
    codes, zeros, scales = _drawn(rng, n, k, -(-k // size), bits)
    zeros = np.full_like(zeros, 1 << (bits - 1)) if sym else np.minimum(zeros, (1 << bits) - v2)
    group_of = np.arange(k) // size
    if order is not None:
        group_of = group_of[np.argsort(order)]
    tensors = {
        "qweight": words(codes.T, bits, 0),
        "qzeros": words((zeros if v2 else zeros - 1).T, bits, 1),
        "scales": np.ascontiguousarray(scales.T),
    }
    if keep_index or order is not None:
        tensors["g_idx"] = group_of.astype(np.int32)
    return tensors, _meant(codes, zeros, scales, group_of)


def awq(rng: np.random.Generator, n: int, k: int, group: int) -> Layer:
    codes, zeros, scales = _drawn(rng, n, k, -(-k // group), 4)
    zeros = np.minimum(zeros, 15)
    shuffled = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # nibble i of a word holds column shuffled[i]
    shuffle = lambda a: a.reshape(len(a), -1, 8)[:, :, shuffled].reshape(len(a), -1)
    tensors = {
        "qweight": words(shuffle(codes.T), 4, 1),
        "qzeros": words(shuffle(zeros.T), 4, 1),
        "scales": np.ascontiguousarray(scales.T),
    }
    return tensors, _meant(codes, zeros, scales, np.arange(k) // group)


def chatglm(rng: np.random.Generator, n: int, k: int, bits: int) -> Layer:
    half = 1 << (bits - 1)
    codes = rng.integers(-half, half, (n, k))
    scales = rng.lognormal(-4, 1, n).astype(np.float16)
    stored = codes if bits == 8 else ((codes[:, 0::2] & 15) << 4) | (codes[:, 1::2] & 15)
    meant = (codes * scales.astype(np.float64)[:, None]).astype(np.float32)
    return {"weight": stored.astype(np.uint8).view(np.int8), "weight_scale": scales}, meant


def compressed(
    rng: np.random.Generator,
    n: int,
    k: int,
    group: int,
    bits: int = 4,
    packed: bool = True,
    sym: bool = True,
    order: Array | None = None,
) -> Layer:
    size = k if group < 0 else group
    codes, zeros, scales = _drawn(rng, n, k, -(-k // size), bits)
    half = 1 << (bits - 1)
    zeros = np.full_like(zeros, half) if sym else np.minimum(zeros, 2 * half - 1)
    group_of = np.arange(k) // size
    tensors: dict[str, Array] = {"weight_scale": scales}
    if order is not None:
        group_of = group_of[np.argsort(order)]
        tensors["weight_g_idx"] = group_of.astype(np.int32)
    if packed:
        tensors |= {"weight_packed": words(codes, bits, 1), "weight_shape": np.array([n, k], np.int64)}
    else:
        tensors["weight"] = (codes - half).astype(np.int8)
    if not sym:
        stored = words(zeros, bits, 0) if packed else (zeros - half).astype(np.int8)
        tensors["weight_zero_point"] = stored
    return tensors, _meant(codes, zeros, scales, group_of)


def fp8(rng: np.random.Generator, n: int, k: int, scale: str = "block") -> Layer:
    """weight holds the bits of e4m3; to be stored as F8_E4M3."""
    bits = rng.integers(0, 256, (n, k), dtype=np.uint8)
    bits[bits & 127 == 127] = 0
    exponent, mantissa = (bits >> 3 & 15).astype(np.int64), (bits & 7).astype(np.float64)
    size = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    values = np.where(bits >> 7, -size, size)
    shape = {"block": (-(-n // 128), -(-k // 128)), "row": (n, 1), "whole": (1,)}[scale]
    scales = rng.lognormal(-8, 0.5, shape).astype(np.float32)
    spread = scales[np.arange(n)[:, None] // 128, np.arange(k) // 128] if scale == "block" else scales
    name = "weight_scale_inv" if scale == "block" else "weight_scale"
    return {"weight": bits, name: scales}, (values * spread).astype(np.float32)
