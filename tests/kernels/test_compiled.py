"""Old compiled kernels go, those in use and those of others stay."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from flm.kernels.compiled import HELD, SUPERSEDED, UNUSED, hold, prune_cubins, prune_folders
from flm.kernels.errors import CacheUnusable

NOW = 2e9
HOLDER = """
import sys
from pathlib import Path
from flm.kernels.compiled import hold
held = hold(Path(sys.argv[1]), "here")
print("held", flush=True)
sys.stdin.read()
"""


def left(root: Path, name: str, installation: str, age: float) -> Path:
    """A folder as a process that has ended leaves it."""
    folder = root / name
    hold(folder, installation).close()
    (folder / "a.nbc").write_bytes(b"code")
    os.utime(folder / HELD, (NOW - age, NOW - age))
    return folder


@pytest.mark.parametrize(
    ("installation", "age", "stays"),
    [
        ("here", SUPERSEDED - 60, True),
        ("here", SUPERSEDED + 60, False),
        ("elsewhere", UNUSED - 60, True),
        ("elsewhere", UNUSED + 60, False),
    ],
)
def test_folders_go_by_age_and_version(tmp_path: Path, installation: str, age: float, stays: bool) -> None:
    folder = left(tmp_path, "kernels-old", installation, age)
    own = left(tmp_path, "kernels-own", "here", 10 * UNUSED)
    prune_folders(tmp_path, own, "here", NOW)
    assert folder.exists() == stays
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["kernels-own"] + ["kernels-old"] * stays
    )


def test_folders_of_versions_that_did_not_hold_them_go_by_age(tmp_path: Path) -> None:
    for name, age in (("kernels-a", UNUSED - 60), ("kernels-b", UNUSED + 60), ("other", 10 * UNUSED)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (NOW - age, NOW - age))
    prune_folders(tmp_path, tmp_path / "kernels-own", "here", NOW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels-a", "other"]


def test_what_a_running_process_holds_stays_until_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "kernels-old"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        os.utime(folder / HELD, (0, 0))
        prune_folders(tmp_path, tmp_path / "kernels-own", "here", NOW)
        assert folder.exists()
        holder.communicate()
    prune_folders(tmp_path, tmp_path / "kernels-own", "here", NOW)
    assert not folder.exists()


def test_a_folder_that_goes_while_it_is_taken_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, flock = left(tmp_path, "kernels-old", "here", 2 * UNUSED), fcntl.flock

    def late(file: IO[str], how: int) -> None:
        monkeypatch.undo()
        folder.rename(tmp_path / "gone")  # by another process, between our open and our lock
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with hold(folder, "there") as held:
        held.seek(0)
        assert held.read() == "there" == (folder / HELD).read_text()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        CacheUnusable, match=r"/file/kernels: Not a directory; expected .* below XDG_CACHE_HOME"
    ):
        hold(tmp_path / "file" / "kernels", "here")


def test_cubins_go_with_what_is_told_of_them(tmp_path: Path) -> None:
    for name, age in (("young", UNUSED - 60), ("old", UNUSED + 60)):
        for suffix in (".cubin", ".json"):
            (tmp_path / name).with_suffix(suffix).write_bytes(b"x")
            os.utime((tmp_path / name).with_suffix(suffix), (NOW - age, NOW - age))
    prune_cubins(tmp_path, NOW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["young.cubin", "young.json"]
