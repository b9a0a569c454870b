"""The file under checkpoints: exact bounds, reads that are announced change no byte, and a file that changes is an error."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from flm.worker.errors import CheckpointError
from flm.worker.files.byte_file import NARROW_GAP, ByteFile


def test_announced_reads_give_the_same_bytes(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8)
    (tmp_path / "f").write_bytes(content.tobytes())
    file = ByteFile(tmp_path / "f")
    assert file.size == 300_000
    file.will_read(10, 200_000)
    file.will_read_rows(100, 1000, 10, 500, range(3, 200))
    file.will_read_rows(0, 100_000, 50_000, 100_000 - NARROW_GAP - 1, range(3))
    file.will_read_rows(0, 1, 0, 0, range(0))
    np.testing.assert_array_equal(file.bytes_at(0, file.size), content)
    np.testing.assert_array_equal(file.bytes_at(299_990, 10), content[-10:])
    for first, length in (
        (0, 1000),
        (10, 500),
        (999, 1),
        (300, 127),
        (0, 0),
    ):  # whole rows, pieces, short ones
        want = content[100 : 100 + 200 * 1000].reshape(200, 1000)[3:200, first : first + length]
        np.testing.assert_array_equal(file.rows_at(100, 1000, first, length, range(3, 200)), want)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what a process reads")
def test_no_more_is_copied_than_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(1 << 20))
    file = ByteFile(tmp_path / "f")
    copied = lambda: int(Path("/proc/self/io").read_text().split()[1])
    before = copied()
    file.rows_at(0, 4096, 1024, 2048, range(256))
    spent = copied() - before
    assert 256 * 2048 <= spent < 256 * 2048 + 4096  # and the text of the counter itself


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="empty: the file is empty"):
        ByteFile(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        ByteFile(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot be read: a regular file expected"):
        ByteFile(tmp_path)
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 12\n")
    with pytest.raises(CheckpointError, match="pointer: is a Git LFS pointer, not the file; `git lfs pull`"):
        ByteFile(tmp_path / "pointer")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(10))
    (tmp_path / "f").chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        ByteFile(tmp_path / "f")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(100_000))
    replaced = ByteFile(path)
    (tmp_path / "new").write_bytes(bytes([1]) * 10)
    (tmp_path / "new").rename(path)  # another file under the name: the opened one is whole
    assert not replaced.bytes_at(0, 100_000).any()
    path.write_bytes(bytes(100_000))
    cut, written = ByteFile(path), ByteFile(path)
    os.truncate(path, 4096)
    with pytest.raises(CheckpointError, match="cut short while it was read: 100000 bytes when it was opened"):
        cut.bytes_at(0, 100_000)
    with pytest.raises(CheckpointError, match="written to while it was read"):
        written.bytes_at(0, 100)
