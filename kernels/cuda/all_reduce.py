"""One-shot all-reduce between GPUs of one host, over buffers that every rank has mapped (CUDA IPC).

For messages up to a few hundred KiB; above, NCCL moves fewer bytes. Shape legend: T tokens, E hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flm.kernels.cuda.check import ACTIVATIONS, Array, check, dimensions
from flm.kernels.cuda.kernel import Device, Kernel, instance
from flm.kernels.errors import CollectiveTimeout, ShapeError

THREADS = 256
MOST_RANKS = 16


@dataclass(frozen=True, eq=False)
class Exchange:
    """One rank's view of the shared buffers. All arrays are on this rank's device.

    data uint64 [world]: where rank r's contributions lie, [2, slots, width] of 2 bytes; flags uint64 [world]: where its
    flags lie, uint32 [slots, world], zero at first; epochs uint32 [slots], zero at first; status int32 [1], zero: all well.
    timeout: seconds that a wait may last.
    """

    rank: int
    world: int
    slots: int
    width: int
    data: Array
    flags: Array
    epochs: Array
    status: Array
    timeout: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world <= MOST_RANKS:
            raise ShapeError(
                f"a rank below a world of at most {MOST_RANKS} expected, got {self.rank} of {self.world}"
            )
        for name, shape, dtype in (
            ("data", (self.world,), "uint64"), ("flags", (self.world,), "uint64"), ("epochs", (self.slots,), "uint32"),
            ("status", (1,), "int32"),
        ):  # fmt: skip
            check(name, getattr(self, name), shape, dtype)

    def raise_failure(self, status: int) -> None:
        """Raises CollectiveTimeout where `status`, read back from the device, names a rank that did not come."""
        if status:
            raise CollectiveTimeout(self.rank, [status - 1], self.timeout)


def data_bytes(slots: int, width: int) -> int:
    """Bytes of one rank's contributions."""
    return 2 * slots * width * 2


def kernel(activation: str) -> Kernel:
    """The instance that sums alone."""
    return instance("all_reduce.cu", "all_reduce", activation)


def fused_kernel(residual: str, activation: str) -> Kernel:
    """The instance that adds to the residual stream and norms it too."""
    return instance("all_reduce.cu", "all_reduce_rms_norm", residual, activation)


def _arguments(exchange: Exchange, x_TE: Array, T: int, E: int) -> list[Any]:
    if E % 8 or exchange.width != E or exchange.slots < T:
        raise ShapeError(
            f"at most {exchange.slots} rows of {exchange.width} expected, a multiple of 8, got {T} of {E}"
        )
    args = [
        exchange.data,
        exchange.flags,
        exchange.epochs,
        exchange.status,
        x_TE,
        exchange.rank,
        exchange.world,
    ]
    return [*args, exchange.slots, E, np.int64(exchange.timeout * 1e9)]


def all_reduce(device: Device, exchange: Exchange, x_TE: Array) -> None:
    """x = the sum over ranks, added in rank order: the same bits on every rank. float16 or bfloat16.

    Every rank must make the same calls. Failures show in exchange.status, later; see raise_failure.
    """
    T, E = dimensions("x", x_TE, 2)
    activation = check("x", x_TE, (T, E), *ACTIVATIONS)
    if T:
        device.launch(kernel(activation), (T,), THREADS, _arguments(exchange, x_TE, T, E))


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
    if T:
        args = [*_arguments(exchange, delta_TE, T, E), x_TE, weight_E, out_TE, float(eps)]
        device.launch(fused_kernel(residual, activation), (T,), THREADS, args)
