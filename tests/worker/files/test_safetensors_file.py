"""The safetensors reader against the `safetensors` package, and against every way a file can be broken."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from flm.kernels.quant import bfloat16_bits
from flm.worker.config import Span
from flm.worker.errors import CheckpointError
from flm.worker.files.safetensors_file import INDEX_NAME, SafetensorsFile, open_safetensors

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_reads_what_the_package_reads() -> None:
    path = GOLDEN / "llama31" / "model.safetensors"
    file, want = SafetensorsFile(path), load_file(path)
    assert file.tensors.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_array_equal(file.read(name), values)


def test_slices_of_rows_and_columns() -> None:
    path = GOLDEN / "llama31" / "model.safetensors"
    file, name = SafetensorsFile(path), "model.layers.1.mlp.down_proj.weight"
    want = load_file(path)[name]
    np.testing.assert_array_equal(file.read(name, Span(3, 17)), want[3:17])
    np.testing.assert_array_equal(file.read(name, None, Span(16, 33)), want[:, 16:33])
    np.testing.assert_array_equal(file.read(name, Span(0, 1), Span(79, 80)), want[:1, 79:])


@pytest.mark.parametrize("dtype", ["float16", "int8", "uint8", "int32", "int64", "float64"])
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    values = np.arange(12, dtype=dtype).reshape(3, 4)
    save_file({"x": values, "empty": values[:0]}, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(file.read("x"), values)
    assert file.read("empty").shape == (0, 4)


def test_bfloat16_and_float8_come_as_bits_wherever_the_data_begins(tmp_path: Path) -> None:
    bits = bfloat16_bits(np.linspace(-3, 3, 6, dtype=np.float32).reshape(2, 3))
    header = {
        "w": entry("BF16", [2, 3], 0, 12),
        "q": entry("F8_E4M3", [5], 12, 17),
        "__metadata__": {"format": "pt", "odd": "x"},
    }
    raw = json.dumps(header).encode()
    for padding in range(4):  # tensors need not be aligned
        path = write(
            tmp_path / f"{padding}.safetensors", raw + b" " * padding, bits.tobytes() + bytes(range(5))
        )
        file = SafetensorsFile(path)
        np.testing.assert_array_equal(file.read("w"), bits)
        np.testing.assert_array_equal(file.read("q"), np.arange(5))
        assert file.tensors["w"].dtype == "BF16"


def test_truncated_anywhere_is_an_error(tmp_path: Path) -> None:
    whole = (GOLDEN / "llama2" / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "m.safetensors"
    for length in [0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"truncated|empty") as caught:
            SafetensorsFile(path)
        assert str(path) in str(caught.value)
    path.write_bytes(whole)
    SafetensorsFile(path)


BROKEN: dict[str, tuple[Any, str]] = {
    "not json": (b"{not json", "not JSON"),
    "not utf-8": (b'{"\xff": 1}', "not JSON"),
    "a list": ([1, 2], "must be a JSON object, found list"),
    "deep": (b"[" * 100_000, "JSON"),
    "unknown dtype": ({"w": entry("F4", [2], 0, 8)}, "tensor 'w' has unknown dtype 'F4'; known: BF16"),
    "dtype no text": ({"w": entry(["F32"], [2], 0, 8)}, "unknown dtype"),  # type: ignore[arg-type]
    "bytes against shape": ({"w": entry("F32", [2, 2], 0, 8)}, "needs 16 bytes, its data_offsets hold 8"),
    "beyond the end": (
        {"w": entry("F32", [3], 0, 12)},
        "truncated: 82 bytes expected, where tensor 'w' ends, found 78",
    ),
    "huge": ({"w": entry("F32", [2**40, 2**40], 0, 8)}, "needs"),
    "more digits than Python prints": ({"w": entry("F32", [2**62] * 9999, 0, 8)}, "up to 32 sizes"),
    "an endless size": ({"w": entry("F32", [2**64], 0, 8)}, "< 2**63"),
    "negative": ({"w": entry("F32", [-2], -8, 0)}, ">= 0"),
    "swapped": ({"w": entry("F32", [2], 8, 0)}, "in order"),
    "float shape": ({"w": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "whole numbers"),
    "bool shape": ({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "whole numbers"),
    "missing field": ({"w": {"dtype": "F32", "shape": [2]}}, "expected dtype, shape and two data_offsets"),
    "three offsets": ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}, "two data_offsets"),
    "no object": ({"w": 3}, "expected dtype, shape and two data_offsets"),
    "overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F16", [2], 4, 8)}, "'b' at byte"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers(tmp_path: Path, case: str) -> None:
    header, message = BROKEN[case]
    path = write(tmp_path / "m.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert message in str(caught.value)
    assert caught.value.file == str(path)


SIZES = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**63 - 1, 2**64, 10**4299]))
VALUES = st.recursive(
    SIZES | st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.just("F32"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "BF16"]) | VALUES,
        "shape": st.lists(SIZES, max_size=40) | VALUES,
        "data_offsets": st.tuples(SIZES, SIZES).map(list) | VALUES,
    },
)
HEADERS = (
    st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES | VALUES, max_size=3) | VALUES
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(HEADERS.map(lambda header: json.dumps(header).encode()) | st.binary(max_size=40))
def test_no_header_raises_anything_else(header: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "m.safetensors", header, bytes(40))
        with suppress(CheckpointError):
            file = SafetensorsFile(path)
            for name in file.tensors:
                file.read(name)


def test_an_absurd_header_length_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(
        CheckpointError, match="not a safetensors file: a header of 9223372036854775808 bytes"
    ):
        SafetensorsFile(path)


def sharded(directory: Path) -> Path:
    tensors = load_file(GOLDEN / "llama2" / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({n: tensors[n] for n in held}, directory / file)
    weight_map = {n: file for file, held in parts.items() for n in held}
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def test_sharded_directory(tmp_path: Path) -> None:
    files = open_safetensors(sharded(tmp_path))
    want = load_file(GOLDEN / "llama2" / "model.safetensors")
    assert files.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_array_equal(files[name].read(name), values)


def edited(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        index = json.loads((directory / INDEX_NAME).read_text())
        change(index["weight_map"])
        (directory / INDEX_NAME).write_text(json.dumps(index))

    return edit


BROKEN_INDEX: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent file": (edited(lambda m: m.update({"model.norm.weight": "c.safetensors"})), "'c.safetensors'"),
    "another folder": (
        edited(lambda m: m.update({"model.norm.weight": "../c.safetensors"})),
        "a file beside it",
    ),
    "tensor not there": (edited(lambda m: m.update({"x": "a.safetensors"})), "does not hold it"),
    "file not text": (edited(lambda m: m.update({"x": 1})), "name of a file beside it, found 1"),
    "bad json": (lambda d: (d / INDEX_NAME).write_text("{"), "weight_map"),
    "deep json": (lambda d: (d / INDEX_NAME).write_text("[" * 100_000), "weight_map"),
    "no text": (lambda d: (d / INDEX_NAME).write_bytes(b"\xff\xfe"), "weight_map"),
    "a list for a map": (lambda d: (d / INDEX_NAME).write_text('{"weight_map": [1]}'), "weight_map"),
    "no name": (edited(lambda m: m.update({"x": ""})), "names ''"),
    "a name that no file can have": (
        edited(lambda m: m.update({"x": "a\0b"})),
        "which is not in the directory",
    ),
    "no weight_map": (lambda d: (d / INDEX_NAME).write_text("{}"), "weight_map"),
}


@pytest.mark.parametrize("case", BROKEN_INDEX)
def test_broken_index(tmp_path: Path, case: str) -> None:
    change, message = BROKEN_INDEX[case]
    change(sharded(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(tmp_path)
    assert message in str(caught.value)
    assert INDEX_NAME in caught.value.file


def test_no_weights_in_the_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or .*files: none"):
        open_safetensors(tmp_path)
