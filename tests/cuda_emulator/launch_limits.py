"""What a GPU of any kind from sm_80 on takes. The most shared memory that a block can ask for is that of sm_86 and sm_89."""

from __future__ import annotations

from flm.kernels.cuda.kernel import Kernel

MOST_THREADS, MOST_BLOCKS, MOST_SHARED = 1024, (2**31 - 1, 65535, 65535), 99 << 10


def check_limits(kernel: Kernel, grid: tuple[int, ...], block: int, shared: int) -> None:
    """ValueError for a launch that a GPU refuses."""
    fits = len(grid) <= 3 and all(1 <= n <= most for n, most in zip(grid, MOST_BLOCKS, strict=False))
    if not (fits and 1 <= block <= MOST_THREADS and 0 <= shared <= MOST_SHARED):
        raise ValueError(f"{kernel.name}: {grid} blocks of {block} threads with {shared} bytes are refused")
