"""Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011)."""

from __future__ import annotations

MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds over four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """The draw of one request at one position, in [0, 1) with 53 bits: key = seed, counter = position."""
    seed, position = int(seed) & (2**64 - 1), int(position) & (2**64 - 1)
    w0, w1, _, _ = philox4x32((position & MASK, position >> 32, 0, 0), (seed & MASK, seed >> 32))
    return float((w0 << 21) | (w1 >> 11)) / 2.0**53
