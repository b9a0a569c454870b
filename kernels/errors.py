"""Errors of the kernels. Every message says what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class KernelError(Exception):
    """Root of all errors that kernels raise. Where `permanent`, the same on the same machine fails again, until somebody
    changes something."""

    permanent: ClassVar[bool] = False


class ShapeError(KernelError):
    """An array or a matrix has the wrong shape, layout or length."""


class DTypeError(KernelError):
    """An array has the wrong dtype."""


class UnsupportedFormat(KernelError):
    """A weight format that these kernels do not know."""

    permanent = True


class OpenMPMissing(KernelError):
    """numba found no OpenMP runtime."""

    permanent = True

    def __init__(self, found: str) -> None:
        super().__init__(
            f"numba's OpenMP threading layer is required, {found}. Install the GNU OpenMP runtime "
            "(Debian, Ubuntu: apt install libgomp1; Fedora: dnf install libgomp; macOS: brew install libomp)."
        )


class CacheUnusable(KernelError):
    """The folder for compiled kernels cannot be made or written."""

    permanent = True

    def __init__(self, folder: object, why: str) -> None:
        super().__init__(
            f"compiled kernels cannot be kept in {folder}: {why}; expected a folder that can be written, "
            "below XDG_CACHE_HOME or ~/.cache"
        )


class CollectiveError(KernelError):
    """A collective between ranks did not complete."""


class CollectiveTimeout(CollectiveError):
    """Some ranks did not arrive before the deadline; `missing` names them."""

    def __init__(self, rank: int, missing: Sequence[int], seconds: float) -> None:
        self.rank, self.missing = rank, tuple(missing)
        names = ", ".join(str(r) for r in self.missing)
        super().__init__(f"rank {rank} waited {seconds:g} s in a collective; missing ranks: {names}")


class CollectiveAborted(CollectiveError):
    """Some rank called abort() on the group."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} left a collective because the group was aborted")


class CollectiveFailed(CollectiveError):
    """What carries the collectives of a rank reported an error; `said` is its own word for it."""

    def __init__(self, rank: int, said: str) -> None:
        super().__init__(f"rank {rank}: {said}")


class ToolkitMissing(KernelError):
    """A library of CUDA's, or its headers, is not installed; `extra` of this package brings it."""

    permanent = True

    def __init__(self, found: str, packages: str, extra: str = "cuda13") -> None:
        super().__init__(f"{found}; they come with pip install 'flm-cluster[{extra}]' ({packages})")


class LibraryFailed(KernelError):
    """A call of one of NVIDIA's libraries reported an error: its number and what it stands for."""

    def __init__(self, call: str, status: int, said: str) -> None:
        self.status = status
        super().__init__(f"{call}: {said} (status {status})")


class UnsupportedDevice(KernelError):
    """No GPU, no driver for it, or one that these kernels do not run on."""

    permanent = True


class DeviceFailed(KernelError):
    """A GPU stopped with an error; nothing can run on it in this process any more."""

    def __init__(self, name: str, said: str) -> None:
        super().__init__(
            f"GPU {name}: {said}; the process that uses it has to be started again. Where it comes back, look at "
            "nvidia-smi and the kernel's log (Xid) for a broken GPU, else run with CUDA_LAUNCH_BLOCKING=1 and report it"
        )


class CompileError(KernelError):
    """NVRTC refused a kernel; `log` is what it said."""

    permanent = True

    def __init__(self, what: str, log: str) -> None:
        self.log = log
        super().__init__(f"{what} does not compile: {log}")


class DeviceMemoryFull(KernelError):
    """An allocation on a GPU failed."""

    def __init__(self, wanted: int, free: int, total: int) -> None:
        mib = lambda n: f"{n / 2**20:,.0f} MiB"
        super().__init__(
            f"the GPU has no room for {mib(wanted) if wanted else 'something'} more: {mib(free)} of {mib(total)} are free. Lower kv_cache.memory or "
            "max_context, quantise to int4, or use more GPUs (tensor_parallel)"
        )
