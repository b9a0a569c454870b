"""Low-rank adapters on a GPU. Shape legend: see flm.kernels.adapter_ops; A adapters, P parts of a product at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.adapter_ops import Factors
from flm.kernels.cuda.check import Array, check, dimensions
from flm.kernels.cuda.elementwise import THREADS, width
from flm.kernels.cuda.kernel import Device, Kernel, instance
from flm.kernels.cuda.op_calls import OpCalls
from flm.kernels.cuda.pack import rounded
from flm.kernels.errors import ShapeError

ALIGNED = 8  # elements: every matrix begins where a vector of them may


@dataclass(frozen=True, eq=False)
class CudaAdapters:
    """parts [A, P, 6] int64 and scales [A, P] as adapters.cu says; factors in the type `dtype` of activations, as bits.
    inputs: of x; stop: columns that out must have at least."""

    parts: Array
    scales: Array
    factors: Array
    dtype: str
    width: int
    inputs: int
    stop: int
    largest_rank: int
    widest: int

    @property
    def nbytes(self) -> int:
        return int(self.parts.nbytes + self.scales.nbytes + self.factors.nbytes)


def pack_adapters(adapters: Sequence[Sequence[Factors]], activation: str, device: Device) -> CudaAdapters:
    """Factors are rounded to the activations' type."""
    every = [f for factors in adapters for f in factors]
    if len({f.down.shape[1] for f in every}) != 1:
        raise ShapeError("factors over the same inputs expected")
    most = max(map(len, adapters))
    parts, scales = np.zeros((len(adapters), most, 6), np.int64), np.zeros((len(adapters), most), np.float32)
    pieces: list[NDArray[Any]] = []
    at, widest_room = 0, 1
    for number, factors in enumerate(adapters):
        room = 0
        for place, f in enumerate(factors):
            begins = []
            for bits in (rounded(f.down, activation), rounded(f.up, activation).T):
                begins.append(at)
                pieces += [bits.reshape(-1), np.zeros(-bits.size % ALIGNED, np.uint16)]
                at += pieces[-2].size + pieces[-1].size
            parts[number, place] = (*begins, f.rank, f.up.shape[0], f.start, room)
            scales[number, place] = f.scale
            room += f.rank
        widest_room = max(widest_room, room)
    return CudaAdapters(
        device.asarray(parts),
        device.asarray(scales),
        device.asarray(np.concatenate(pieces)),
        activation,
        widest_room,
        every[0].down.shape[1],
        max(f.columns[1] for f in every),
        max(f.rank for f in every),
        max(f.up.shape[0] for f in every),
    )


def kernels(activation: str, inputs: int) -> tuple[Kernel, Kernel]:
    """The instances for activations of this type and x of so many columns."""
    shrink = instance("adapters.cu", "adapter_shrink", activation, width(inputs))
    return shrink, instance("adapters.cu", "adapter_expand", activation)


def adapt(
    device: Device, x_TK: Array, adapters: CudaAdapters, adapter_T: Array, room_TW: Array, out_TN: Array
) -> None:
    """out[t] += what adapter number adapter[t] adds for x[t]; nothing for -1. x, out: the type packed for; room: float32."""
    (T, N), (_, P, _) = dimensions("out", out_TN, 2), adapters.parts.shape
    if adapters.stop > N:
        raise ShapeError(f"out: at least {adapters.stop} columns expected, got {N}")
    check("x", x_TK, (T, adapters.inputs), adapters.dtype)
    check("out", out_TN, (T, N), adapters.dtype)
    check("adapter", adapter_T, (T,), "int32")
    check("room", room_TW, (T, adapters.width), "float32")
    if not T:
        return
    shrink, expand = kernels(adapters.dtype, adapters.inputs)
    table = (adapter_T, adapters.parts)
    args = [x_TK, *table, adapters.scales, adapters.factors, room_TW, adapters.inputs, adapters.width, P]
    device.launch(shrink, (T, P, -(-adapters.largest_rank // 8)), THREADS, args)
    args = [room_TW, *table, adapters.factors, out_TN, adapters.width, N, P]
    device.launch(expand, (T, -(-adapters.widest // THREADS), P), THREADS, args)


class AdapterCalls(OpCalls):
    """The part of CudaBackend that flm.kernels.adapter_ops describes."""

    def pack_adapters(self, adapters: Sequence[Sequence[Factors]]) -> CudaAdapters:
        return pack_adapters(adapters, self.activation, self.device)

    def adapt(
        self, x_TK: Array, adapters: CudaAdapters, adapter_T: Array, room_TW: Array, out_TN: Array
    ) -> None:
        numbers = self._on_device(adapter_T)
        self.in_order(lambda: adapt(self.device, x_TK, adapters, numbers, room_TW, out_TN))
