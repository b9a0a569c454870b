"""Where compiled kernels are kept between starts, and when they are given up.

CPU kernels of one version have a folder of their own, which the processes that use it hold; cubins lie in one folder,
each under the digest of all it was made of. What is given up: a folder of CPU kernels that nobody holds and nobody used
for 30 days, or for a day where the same installation has another version now; a cubin that nobody used for 30 days. It is
looked for when something new is compiled, for only then does the cache grow. Nothing else is ever touched.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

from flm.kernels.errors import CacheUnusable

UNUSED = 30 * 86400.0  # seconds
SUPERSEDED = 86400.0
HELD = ".held"  # locked by those that use the folder; says of which installation it is, and when it was last used
REMOVED = ".removed-"


def cache_root() -> Path:
    """$XDG_CACHE_HOME/flm-cluster, by default below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "flm-cluster"


def hold(folder: Path, installation: str) -> IO[str]:
    """Make a folder that is not removed for as long as the file that this returns is open. CacheUnusable where it cannot be
    made."""
    try:
        return _hold(folder, installation)
    except OSError as error:
        raise CacheUnusable(folder, error.strerror or str(error)) from error


def _hold(folder: Path, installation: str) -> IO[str]:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as stack:  # removed between two of our steps
            file = stack.enter_context(open(folder / HELD, "a+"))
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / HELD)):
                if not os.fstat(file.fileno()).st_size:
                    file.write(installation)
                    file.flush()
                os.utime(folder / HELD)
                stack.pop_all()
                return file


def prune_folders(root: Path, own: Path, installation: str, now: float) -> None:
    """Remove what is given up of the folders of CPU kernels in `root`, but `own`. `now`: seconds since the epoch."""
    for folder in root.glob("kernels-*"):
        with suppress(OSError):  # someone holds it, or removes it too, or it is not ours to remove
            if folder != own and _given_up(folder, installation, now):
                folder.rename(root / f"{REMOVED}{folder.name}-{os.getpid()}")
    for folder in root.glob(f"{REMOVED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _given_up(folder: Path, installation: str, now: float) -> bool:
    """OSError where someone holds the folder."""
    if not (folder / HELD).exists():
        return now - folder.stat().st_mtime > UNUSED
    with open(folder / HELD) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        age = now - os.fstat(file.fileno()).st_mtime
        return age > (SUPERSEDED if file.read() == installation else UNUSED)


def used(cubin: Path) -> None:
    """Note that a cubin is in use."""
    with suppress(OSError):  # a cache that others keep for us
        os.utime(cubin)


def prune_cubins(folder: Path, now: float) -> None:
    """Remove the cubins that are given up, and what is told of them. `now`: seconds since the epoch."""
    for cubin in folder.glob("*.cubin"):
        with suppress(OSError):  # another process removes it too
            if now - cubin.stat().st_mtime > UNUSED:
                cubin.unlink()  # first: its presence says that both are whole
                cubin.with_suffix(".json").unlink()
