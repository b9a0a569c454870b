"""Weights packed by rows, in threads, are those that are packed whole."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from threading import get_ident
from typing import Any

import numpy as np
import pytest

from flm.kernels import stored
from flm.kernels.cpu.pack import pack as cpu_pack
from flm.kernels.cuda.grouped import HostArrays
from flm.kernels.cuda.pack import pack as cuda_pack
from flm.kernels.quant import QuantizedMatrix, concat_rows, from_float, from_gguf_blocks, quantize
from flm.kernels.stored import StoredMatrix, stacked_below

ROWS, INPUTS = 700, 96


def matrices() -> dict[str, QuantizedMatrix]:
    draw = np.random.default_rng(0)
    values = draw.standard_normal((ROWS, INPUTS)).astype(np.float32)
    int8 = quantize(values, "int8", 32)
    assert int8.scales is not None
    wide = np.where(np.arange(ROWS)[:, None] == 600, 1e6, 1.0).astype(np.float32)
    q4 = draw.integers(0, 255, ROWS * INPUTS // 32 * 18, dtype=np.uint8)
    q4.reshape(-1, 18)[:, 1] = 0x30  # scales that are no NaN
    gather = draw.permutation(INPUTS).astype(np.int32)
    return {
        "float32": from_float(values),
        "bfloat16": from_float(values, "bfloat16"),
        "int8": int8,
        "int4": quantize(values, "int4", 48),
        "one row of float32 scales": quantize(values * wide, "int8", 32),
        "Q4_0": from_gguf_blocks(q4, "Q4_0", (ROWS, INPUTS)),
        "gathered": replace(quantize(values, "int4", 32), gather=gather),
        "fp8": QuantizedMatrix("fp8", (ROWS, INPUTS), int8.codes.view(np.uint8) & 0x77, 32, int8.scales),
    }


def by_rows(matrix: QuantizedMatrix, threads: set[int]) -> StoredMatrix:
    """Rows as a file gives them: scales as wide as these rows need, zero offsets left out."""

    def read(start: int, stop: int) -> QuantizedMatrix:
        threads.add(get_ident())
        part = matrix.slice_rows(start, stop)
        if part.scales is None:
            return part
        narrow = np.abs(part.scales).max() < 60_000
        fit = lambda a: None if a is None else a.astype(np.float16 if narrow else np.float32)
        return replace(part, scales=fit(part.scales), offsets=fit(part.offsets))

    return StoredMatrix(matrix.shape, read)


def arrays(packed: Any) -> list[Any]:
    return [packed.codes, packed.scales, getattr(packed, "offsets", None), packed.gather]


@pytest.mark.parametrize("name", list(matrices()))
def test_packed_by_rows_is_packed_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, host, threads = matrices()[name], HostArrays(), set[int]()
    whole = cpu_pack(matrix), cuda_pack(matrix, "bfloat16", host)
    monkeypatch.setattr(stored, "UNDER_WAY", 64 * INPUTS)
    rows = by_rows(matrix, threads)
    for got, want in zip((cpu_pack(rows), cuda_pack(rows, "bfloat16", host)), whole, strict=True):
        assert (got.shape, got.group) == (want.shape, want.group)
        for ours, theirs in zip(arrays(got), arrays(want), strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours is theirs is None or ours.dtype == theirs.dtype
    np.testing.assert_array_equal(rows.whole().dequantize(), matrix.dequantize())
    assert len(threads) > 1


@pytest.mark.parametrize(("name", "steps"), [("bfloat16", 1), ("int8", 2), ("int4", 4), ("fp8", 2)])
def test_tiles_hold_each_weight_where_weights_h_reads_it(name: str, steps: int) -> None:
    """Element by element, of the first rows and the last ones."""
    matrix = matrices()[name]
    codes = cuda_pack(matrix, "bfloat16", HostArrays()).codes
    plain = matrix.unpacked() if name == "int4" else matrix.codes
    plain = (plain.view(np.uint8) ^ 0x80) if name == "int8" else plain
    for row, column in np.ndindex(40, INPUTS):
        row = row if row < 20 else ROWS - 40 + row
        half, g = divmod(row % 16, 8)
        tile, s = divmod(column // 16, steps)
        t, p, h = column % 16 // 4, column % 4 // 2, column % 2
        lane = codes[row // 16, tile, 4 * g + t]
        if name == "int4":
            found = lane[s] >> 4 * (4 * h + 2 * p + half) & 15
        else:
            bits = "u2" if name == "bfloat16" else "u1"
            found = lane.view(bits).reshape(steps, 2, 2, 2)[s, p, half, h]
        assert found == plain[row, column], (row, column)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_no_second_copy_is_in_memory_while_a_matrix_is_packed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "UNDER_WAY", 1 << 16)
    read = lambda start, stop: from_float(np.full((stop - start, 512), 1, np.float32), "bfloat16")
    matrix = StoredMatrix((4096, 512), read)
    tracemalloc.start()
    packed = cpu_pack(matrix) if name == "cpu" else cuda_pack(matrix, "bfloat16", HostArrays())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert packed.codes.nbytes == 4 << 20
    assert peak < 6 << 20


def test_offsets_that_only_some_rows_need() -> None:
    plain = quantize(np.ones((64, 32), np.float32), "int8", 32)
    assert plain.scales is not None
    shifted = replace(plain, offsets=plain.scales * 2)
    stacked = stacked_below([StoredMatrix.of(plain), StoredMatrix.of(shifted), StoredMatrix.of(plain)])
    want = concat_rows([plain, shifted, plain])
    np.testing.assert_array_equal(stacked.whole().dequantize(), want.dequantize())
    np.testing.assert_array_equal(stacked.read(60, 130).dequantize(), want.dequantize()[60:130])
    np.testing.assert_array_equal(cpu_pack(stacked).dequantize(0, 192), want.dequantize())


def test_an_error_of_one_piece_is_the_error_of_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "UNDER_WAY", 64 * INPUTS)
    matrix = matrices()["int8"]

    def read(start: int, stop: int) -> QuantizedMatrix:
        if start >= 320:
            raise OSError(f"row {start}")
        return matrix.slice_rows(start, stop)

    with pytest.raises(OSError, match="row 320"):
        cpu_pack(StoredMatrix(matrix.shape, read))
