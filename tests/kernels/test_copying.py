"""Copies in pieces on two threads are the plain ones."""

from __future__ import annotations

import numpy as np
import pytest

from flm.kernels.copying import PIECE_BYTES, in_pieces, stacked
from flm.kernels.cpu.pack import pack
from flm.kernels.quant import from_float


def test_pieces_cover_everything_once():
    for count, nbytes in ((0, 0), (7, 10), (100, 3 * PIECE_BYTES), (3, 50 * PIECE_BYTES)):
        seen: list[int] = []
        in_pieces(seen.extend, count, nbytes)
        assert sorted(seen) == list(range(count))


def test_an_error_in_a_piece_is_raised():
    def fail(piece: range) -> None:
        raise ValueError("piece")

    with pytest.raises(ValueError, match="piece"):
        in_pieces(fail, 10, 10 * PIECE_BYTES)


def test_large_arrays_are_stacked_and_packed(rng):
    parts = [rng.integers(0, 9, (n, 700)).astype(np.float32) for n in (3000, 1, 2045)]
    whole = np.concatenate(parts)
    np.testing.assert_array_equal(stacked(parts), whole)
    np.testing.assert_array_equal(pack(from_float(whole)).dequantize(0, len(whole)), whole)
    assert stacked([np.zeros((2, 3), np.int8), np.ones((1, 3), np.int8)]).dtype == np.int8
