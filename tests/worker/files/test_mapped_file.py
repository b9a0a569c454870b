"""The memory map under checkpoints: exact bounds, and reads that are announced change no byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flm.worker.errors import CheckpointError
from flm.worker.files.mapped_file import MappedFile


def test_announced_reads_give_the_same_bytes(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8)
    (tmp_path / "f").write_bytes(content.tobytes())
    file = MappedFile(tmp_path / "f")
    assert file.size == 300_000
    file.will_read(10, 200_000)
    file.will_read_rows(100, 1000, 10, 500, range(3, 200))  # gaps of less than a page
    file.will_read_rows(0, 100_000, 50_000, 20, range(3))
    file.drop_pages()
    np.testing.assert_array_equal(file.bytes_at(0, file.size), content)
    np.testing.assert_array_equal(file.bytes_at(299_990, 10), content[-10:])


def test_what_cannot_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="empty: the file is empty"):
        MappedFile(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        MappedFile(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot be read: "):
        MappedFile(tmp_path)
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 12\n")
    with pytest.raises(CheckpointError, match="pointer: is a Git LFS pointer, not the file; `git lfs pull`"):
        MappedFile(tmp_path / "pointer")
