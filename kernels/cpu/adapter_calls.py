"""AdapterOps on CPUs: packs factors, writes program rows; the work is in adapters.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.adapter_ops import Factors
from flm.kernels.cpu.arrays import I32, address, check, columns, float_bits
from flm.kernels.cpu.emitter import SMALL, Emitter
from flm.kernels.cpu.layout import ADAPTER_CHUNK, ADAPTER_PANELS, ADAPTER_WIDTH
from flm.kernels.cpu.pack import PANEL, pack
from flm.kernels.errors import ShapeError

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class CpuAdapters:
    """See adapters.py for the table. `inputs`, `stop`: columns that x must have, and that out must have at least."""

    table: NDArray[np.int64]
    keep: tuple[Array, ...]  # what the table points into
    width: int
    inputs: int
    stop: int
    largest_rank: int
    widest: int

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.keep)


class AdapterCalls(Emitter):
    """See flm.kernels.adapter_ops."""

    def pack_adapters(self, adapters: Sequence[Sequence[Factors]]) -> CpuAdapters:
        self._load_ops("adapter_shrink", "adapters")
        every = [f for factors in adapters for f in factors]
        if len({f.down.shape[1] for f in every}) != 1:
            raise ShapeError("factors over the same inputs expected")
        table = np.zeros((len(adapters), max(map(len, adapters)), ADAPTER_WIDTH), np.int64)
        keep: list[Array] = []
        width = 0
        for number, factors in enumerate(adapters):
            room = 0
            for place, f in enumerate(factors):
                table[number, place] = self._entry(f, room, keep)
                room += int(table[number, place, 1])
            width = max(width, room)
        stop = max(f.columns[1] for f in every)
        rank, widest = (max(n) for n in zip(*((f.rank, f.up.shape[0]) for f in every), strict=True))
        return CpuAdapters(table, tuple(keep), width, every[0].down.shape[1], stop, rank, widest)

    def _entry(self, f: Factors, room: int, keep: list[Array]) -> list[int]:
        """A row of the table; what it points into is added to `keep`."""
        rank, inputs = f.down.shape
        lanes = -(-rank // 16) * 16
        down = self._arena.take((inputs, lanes), f.down.codes.dtype)
        down[:, :rank] = f.down.codes.T
        up = pack(f.up, self._arena.take).codes
        keep += [down, up]
        leaves = [self._leaves[f"plain_{matrix.format}"] for matrix in (f.down, f.up)]
        first = [address(down), lanes, down.itemsize, leaves[0], rank, float_bits(f.scale), room]
        return [*first, address(up), up.itemsize, leaves[1], f.up.shape[0], f.start]

    def adapt(
        self, x_TK: Array, adapters: CpuAdapters, adapter_T: Array, room_TW: Array, out_TN: Array
    ) -> None:
        (T, N), (count, P, _) = columns("out", out_TN), adapters.table.shape
        if adapters.stop > N:
            raise ShapeError(f"out: at least {adapters.stop} columns expected, got {N}")
        x, out = check("x", x_TK, (T, adapters.inputs)), check("out", out_TN, (T, N))
        numbers = check("adapter", adapter_T, (T,), I32)
        room = check("room", room_TW, (T, adapters.width))
        area = ADAPTER_CHUNK * PANEL * 4
        scratch = self._scratch(area * self.threads)
        row = [x, T, adapters.inputs, numbers, address(adapters.table), room, adapters.width, count, P]
        keep = (x_TK, adapters, adapter_T, room_TW, out_TN, scratch)
        work = T * adapters.inputs * adapters.width
        blocks = -(-adapters.largest_rank // 64)
        self._emit("adapter_shrink", [*row, blocks], *keep, workers=self._workers(work, SMALL))
        pieces = -(-adapters.widest // (PANEL * ADAPTER_PANELS))
        work = T * adapters.largest_rank * adapters.stop
        row += [pieces, out, N, address(scratch), area]
        self._emit("adapter_expand", row, *keep, workers=self._workers(work, SMALL))
