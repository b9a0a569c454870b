"""PyTorch's files: their tensors as they were saved, and nothing that a pickle could do beside."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_writer import STOP, numbers, state, tensor, text, write_archive, write_torch

from flm.worker.config import Span
from flm.worker.errors import CheckpointError
from flm.worker.files.pickle_file import PickleFile, open_pickle_files, pickle_files


def test_tensors_come_as_they_were_saved(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    saved: dict[str, Any] = {
        "a": rng.standard_normal((5, 8)).astype(np.float32),
        "b": rng.standard_normal(7).astype(np.float16),
        "c": rng.integers(0, 60000, (3, 4)).astype(np.uint16),
        "d": rng.integers(-9, 9, (2, 3, 4)).astype(np.int32),
        "scalar": np.float32(2.5).reshape(()),
    }
    file = PickleFile(write_torch(tmp_path / "m.bin", saved))
    assert {name: entry.dtype for name, entry in file.tensors.items()} == {
        "a": "F32", "b": "F16", "c": "BF16", "d": "I32", "scalar": "F32",
    }  # fmt: skip
    for name, values in saved.items():
        np.testing.assert_array_equal(file.read(name), values)
        assert file.tensors[name].nbytes == values.nbytes
    np.testing.assert_array_equal(file.read("a", Span(1, 3), Span(2, 7)), saved["a"][1:3, 2:7])


def test_views_of_a_shared_storage(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32)
    items = {
        "transposed": tensor("Float", "0", 24, 0, (6, 4), (1, 6)),
        "part": tensor("Float", "0", 24, 6, (2, 3), (6, 1)),
    }
    file = PickleFile(write_archive(tmp_path / "m.bin", state(items), {"0": values.tobytes()}))
    np.testing.assert_array_equal(file.read("transposed"), values.reshape(4, 6).T)
    np.testing.assert_array_equal(file.read("part"), values.reshape(4, 6)[1:3, :3])


class Spy:
    """A pickle that would make a directory when it is loaded."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    place = tmp_path / "made"
    path = write_archive(tmp_path / "m.bin", pickle.dumps({"w": Spy(place)}), {})
    with pytest.raises(CheckpointError, match=r"posix\.mkdir, which no checkpoint needs"):
        PickleFile(path)
    assert not place.exists()


ONE = {"0": b"\0" * 96}
BROKEN = {
    "builtins": (b"\x80\x02cbuiltins\neval\n(" + text("1") + b"tR" + STOP, {}, "builtins.eval"),
    "attribute": (b"\x80\x04" + text("torch") + text("load.__globals__") + b"\x93" + STOP, {}, "asks for torch.load"),
    "too long": (state({"w": tensor("Float", "0", 24, 0, (5, 5), (5, 1))}), ONE, "ends at element 24 of a storage of 24"),
    "negative": (state({"w": tensor("Float", "0", 24, 0, (2, 2), (-1, 1))}), ONE, "with strides"),
    "missing": (state({"w": tensor("Float", "7", 24, 0, (4, 6), (6, 1))}), ONE, "data/7 is missing or compressed"),
    "short": (state({"w": tensor("Float", "0", 25, 0, (5, 5), (5, 1))}), ONE, "100 bytes expected, found 96"),
    "list": (b"\x80\x02]" + STOP, {}, "a dictionary of tensors expected, found list"),
    "other": (state({"epoch": b"K\x07"}), {}, "no tensors: epoch"),
    "cut off": (state({"w": tensor("Float", "0", 24, 0, (4, 6), (6, 1))})[:-20], ONE, "not a checkpoint of tensors only"),
    "reference": (b"\x80\x02(" + text("module") + b"tQ" + STOP, {}, "an unknown reference"),
    "no storage": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00" + numbers((2,)) * 2 + b"tR.", {}, "no storage"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path: Path, name: str) -> None:
    pickled, data, message = BROKEN[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        PickleFile(write_archive(tmp_path / "m.bin", pickled, data))
    assert str(tmp_path / "m.bin") in str(caught.value)


def test_other_containers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "old.bin").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(CheckpointError, match=r"is no zip archive, as torch\.save writes since PyTorch 1\.6"):
        PickleFile(tmp_path / "old.bin")
    path = write_archive(
        tmp_path / "m.bin",
        state({"w": tensor("Float", "0", 24, 0, (4, 6), (6, 1))}),
        ONE,
        zipfile.ZIP_DEFLATED,
    )
    with pytest.raises(CheckpointError, match="missing or compressed"):
        PickleFile(path)


def test_which_files_of_a_directory_hold_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_pickle_files(tmp_path)
    for name in ("b.bin", "a.pth", "training_args.bin"):
        write_torch(tmp_path / name, {name: np.zeros((1, 2), np.float32)})
    assert set(open_pickle_files(tmp_path)) == {"a.pth", "b.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "../b.bin", "y": "c.bin"}}')
    assert pickle_files(tmp_path) == [tmp_path / "b.bin", tmp_path / "c.bin"]
