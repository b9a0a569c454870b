"""What the tests of every kind of paged cache have in common: block tables, a step's tokens, and any cut of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Rows = Any  # what picks rows: a slice or numbers
Run = Callable[[Rows], np.ndarray]


class PagedStep:
    """Sequences with contexts of `lengths`, and the tokens of a step that computes the last `new` of each.

    count: blocks of the cache, some of which nobody has. slots: of each sequence, where its tokens lie.
    """

    def __init__(self, rng: np.random.Generator, block_size: int, lengths: list[int], new: list[int]) -> None:
        blocks = [-(-n // block_size) for n in lengths]
        self.count = sum(blocks) + 3
        ids = rng.permutation(self.count).astype(np.int32)
        self.tables = np.zeros((len(lengths), max(blocks) + 2), np.int32)
        self.slots = []
        for table, own, length in zip(self.tables, np.split(ids, np.cumsum(blocks)), lengths, strict=False):
            table[: len(own)] = own
            places = own[:, None] * block_size + np.arange(block_size)
            self.slots.append(places.reshape(-1)[:length].astype(np.int32))
        self.index = np.repeat(np.arange(len(new)), new).astype(np.int32)
        spans = [np.arange(n - m, n) for n, m in zip(lengths, new, strict=True)]
        self.positions = np.concatenate(spans).astype(np.int32)


def assert_any_cut_gives_the_same_bits(run: Run, alone: Run, rng: np.random.Generator) -> None:
    """run, alone: the step's rows on several threads and on one."""
    whole = run(slice(None))
    assert np.array_equal(whole, alone(slice(None)))
    for size in (1, 2, 7):
        parts = [run(slice(i, i + size)) for i in range(0, len(whole), size)]
        assert np.array_equal(whole, np.concatenate(parts)), size
    shuffled = rng.permutation(len(whole))
    assert np.array_equal(whole[shuffled], run(shuffled))


def assert_padding_gives_zeros(step: PagedStep, run: Run) -> None:
    padding = [0, 7, 40]
    whole = run(slice(None))
    step.index[padding] = -1
    got = run(slice(None))
    assert not got[padding].any()
    rest = np.setdiff1d(np.arange(len(whole)), padding)
    assert np.array_equal(got[rest], whole[rest])
