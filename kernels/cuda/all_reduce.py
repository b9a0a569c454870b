"""Sums and gathers between GPUs of one host, over buffers that every rank has mapped (CUDA IPC); in one shot, for short
messages. For long ones, the sums of parts that something else has moved.

Shape legend: T tokens, E hidden, S rows, N this rank's columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.cuda.check import ACTIVATIONS, Array, check, check_aligned, dimensions
from flm.kernels.cuda.kernel import Device, Kernel, instance
from flm.kernels.errors import CollectiveAborted, CollectiveTimeout, ShapeError

THREADS = 256
STEP = 8 * THREADS  # elements that a block handles at once
MOST_RANKS = 16
SLOTS, SLOT_BYTES = 64, 32 << 10
SUMMED = ("float32", *ACTIVATIONS)
ABORTED = -1  # of the status: the host wants waits to end
MOST_BLOCKS = 1024


@dataclass(frozen=True, eq=False)
class Exchange:
    """One rank's view of the shared buffers.

    On this rank's device: data uint64 [world]: where rank r's contributions lie, [2, slots, slot_bytes]; flags uint64
    [world]: where its flags lie, uint32 [slots, world], zero at first; epochs uint32 [slots], zero at first.
    control: the same two words for kernels and (`words`, int32) for the host: a status, zero as long as all is well, and
    the time-out of a wait in ms.
    """

    rank: int
    world: int
    data: Array
    flags: Array
    epochs: Array
    control: Any
    words: NDArray[np.int32]
    slots: int = SLOTS
    slot_bytes: int = SLOT_BYTES

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world <= MOST_RANKS:
            raise ShapeError(
                f"a rank below a world of at most {MOST_RANKS} expected, got {self.rank} of {self.world}"
            )
        for name, shape, dtype in (
            ("data", (self.world,), "uint64"), ("flags", (self.world,), "uint64"), ("epochs", (self.slots,), "uint32"),
            ("words", (2,), "int32"),
        ):  # fmt: skip
            check(name, getattr(self, name), shape, dtype)

    @property
    def timeout(self) -> float:
        """Seconds that a wait may last."""
        return float(self.words[1]) / 1e3

    def set_timeout(self, seconds: float) -> None:
        """Of waits from now on, also in graphs that have been captured."""
        self.words[1] = int(seconds * 1e3)

    def abort(self) -> None:
        """Let every present and later wait of this rank end at once; what is summed then is worth nothing."""
        if not self.words[0]:
            self.words[0] = ABORTED

    def raise_failure(self) -> None:
        """Raises CollectiveTimeout where a rank did not come, CollectiveAborted after abort()."""
        status = int(self.words[0])
        if status > 0:
            raise CollectiveTimeout(self.rank, [status - 1], self.timeout)
        if status:
            raise CollectiveAborted(self.rank)

    def arguments(self) -> list[Any]:
        """What every kernel that exchanges takes first."""
        places = [self.data, self.flags, self.epochs, self.control]
        return [*places, self.rank, self.world, self.slots, self.slot_bytes]

    def holds_rows(self, rows: int, width: int) -> bool:
        """Whether all_reduce_rms_norm takes so many rows of 16-bit elements: each goes through a slot of its own."""
        return width % 8 == 0 and 2 * width <= self.slot_bytes and rows <= self.slots

    def piece(self, count: int, itemsize: int) -> int:
        """Elements of a block's piece, so that `count` elements spread over the slots, as far as these go."""
        spread = -(-count // self.slots)
        return min(-(-spread // STEP) * STEP, self.slot_bytes // itemsize // 8 * 8)


def data_bytes(slots: int = SLOTS, slot_bytes: int = SLOT_BYTES) -> int:
    """Bytes of one rank's contributions."""
    return 2 * slots * slot_bytes


def kernel(dtype: str) -> Kernel:
    """The instance that sums alone."""
    return instance("all_reduce.cu", "all_reduce", dtype)


def fused_kernel(residual: str, activation: str) -> Kernel:
    """The instance that adds to the residual stream and norms it too."""
    return instance("all_reduce.cu", "all_reduce_rms_norm", residual, activation)


def kernels(activation: str) -> list[Kernel]:
    """All that a decoder with these activations needs to cross ranks."""
    each = [
        instance("all_reduce.cu", name, dtype)
        for name in ("all_reduce", "sum_parts")
        for dtype in ("float32", activation)
    ]
    columns = [instance("all_reduce.cu", name, "float32") for name in ("all_gather_cols", "place_columns")]
    return [*each, *columns, fused_kernel("float32", activation)]


def all_reduce(device: Device, exchange: Exchange, x: Array) -> None:
    """x = the sum over ranks, added in rank order: the same bits on every rank. float32, float16 or bfloat16.

    Every rank must make the same calls. Failures show in the exchange's status, later; see raise_failure.
    """
    dtype = check("x", x, tuple(x.shape), *SUMMED)
    for part, piece in _parts(exchange, x):
        args = [*exchange.arguments(), part, np.int64(part.size), piece]
        device.launch(kernel(dtype), (-(-part.size // piece),), THREADS, args)


def broadcast(device: Device, exchange: Exchange, x: Array, root: int) -> None:
    """x = root's x: float32, float16 or bfloat16."""
    dtype = check("x", x, tuple(x.shape), *SUMMED)
    for part, piece in _parts(exchange, x):
        args = [*exchange.arguments(), part, np.int64(part.size), piece, root]
        device.launch(instance("all_reduce.cu", "broadcast", dtype), (-(-part.size // piece),), THREADS, args)


def _parts(exchange: Exchange, x: Array) -> list[tuple[Array, int]]:
    """x, flat, in parts that go through the slots at once, each with its blocks' piece."""
    check_aligned("x", x)
    flat, size = x.reshape(-1), x.dtype.itemsize
    most = exchange.slots * exchange.piece(1 << 62, size)
    cuts = [flat[start : start + most] for start in range(0, flat.size, most)]
    return [(cut, exchange.piece(cut.size, size)) for cut in cuts]


def check_widths(x_SN: Array, out: Array, rank: int, widths: Sequence[int]) -> tuple[int, int]:
    """S and the columns of `out`. Raises ShapeError where the widths are not theirs."""
    S = dimensions("x", x_SN, 2)[0]
    columns = sum(widths)
    check("x", x_SN, (S, widths[rank]), "float32")
    check("out", out, (S, columns), "float32")
    return S, columns


def all_gather_cols(
    device: Device, exchange: Exchange, x_SN: Array, out: Array, widths: Sequence[int], widths_W: Array
) -> None:
    """out [S, sum of widths] = the ranks' columns one after another; rank r contributes widths[r]. float32.

    widths_W: the widths as int32 on the device."""
    S, columns = check_widths(x_SN, out, exchange.rank, widths)
    check_aligned("x", x_SN)
    count = S * max(widths)
    piece = exchange.piece(count, 4)
    for base in range(0, count, exchange.slots * piece):
        blocks = min(-(-(count - base) // piece), exchange.slots)
        args = [*exchange.arguments(), x_SN, widths_W, S, columns, np.int64(base), piece, out]
        device.launch(instance("all_reduce.cu", "all_gather_cols", "float32"), (blocks,), THREADS, args)


def all_reduce_rms_norm(
    device: Device,
    exchange: Exchange,
    delta_TE: Array,
    x_TE: Array,
    weight_E: Array,
    eps: float,
    out_TE: Array,
) -> None:
    """x += the sum over ranks of delta, then out = rms_norm(x): the bits of all_reduce and rms_norm, in one launch.

    x: float32 or delta's dtype; out: delta's, float16 or bfloat16; weight: float32.
    """
    T, E = dimensions("x", x_TE, 2)
    activation = check("delta", delta_TE, (T, E), *ACTIVATIONS)
    residual = check("x", x_TE, (T, E), "float32", activation)
    check("out", out_TE, (T, E), activation)
    check("weight", weight_E, (E,), "float32")
    if not exchange.holds_rows(T, E):
        raise ShapeError(
            f"at most {exchange.slots} rows of {exchange.slot_bytes // 2} expected, a multiple of 8, got {T} of {E}"
        )
    if T:
        args = [*exchange.arguments(), delta_TE, E, x_TE, weight_E, out_TE, float(eps)]
        device.launch(fused_kernel(residual, activation), (T,), THREADS, args)


def sum_parts(device: Device, parts_WN: Array, rank: int, x_N: Array) -> None:
    """x = the sum of this rank's x and the others' rows of parts [world, stride >= N], in rank order: all_reduce's bits."""
    world, stride = dimensions("parts", parts_WN, 2)
    (n,) = dimensions("x", x_N, 1)
    dtype = check("x", x_N, (n,), *SUMMED)
    check("parts", parts_WN, (world, stride), dtype)
    if n > stride:
        raise ShapeError(f"at most {stride} elements expected, got {n}")
    if n:
        args = [parts_WN, np.int64(stride), rank, world, x_N, np.int64(n)]
        blocks = min(-(-n // THREADS), MOST_BLOCKS)
        device.launch(instance("all_reduce.cu", "sum_parts", dtype), (blocks,), THREADS, args)


def place_columns(
    device: Device,
    parts: Array,
    rank: int,
    x_SN: Array,
    out: Array,
    widths: Sequence[int],
    widths_W: Array,
) -> None:
    """all_gather_cols from parts, flat, which holds rank r's [S, widths[r]] after those of the ranks before it."""
    S, columns = check_widths(x_SN, out, rank, widths)
    check("parts", parts, (S * columns,), "float32")
    if S:
        args = [parts, x_SN, widths_W, rank, S, columns, out]
        blocks = min(-(-S * columns // THREADS), MOST_BLOCKS)
        device.launch(instance("all_reduce.cu", "place_columns", "float32"), (blocks,), THREADS, args)
