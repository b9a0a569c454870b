"""AdapterOps in plain NumPy. Shape legend: see adapter_ops.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from flm.kernels.adapter_ops import Factors
from flm.kernels.reference_graph import ReferenceOps

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class ReferenceAdapters:
    """The factors as they came."""

    adapters: Sequence[Sequence[Factors]]
    width: int = 1

    @property
    def nbytes(self) -> int:
        return sum(f.down.nbytes + f.up.nbytes for factors in self.adapters for f in factors)


class ReferenceAdapterOps(ReferenceOps):
    """See adapter_ops.py."""

    def pack_adapters(self, adapters: Sequence[Sequence[Factors]]) -> ReferenceAdapters:
        return ReferenceAdapters(adapters)

    def adapt(
        self, x_TK: Array, adapters: ReferenceAdapters, adapter_T: Array, room_TW: Array, out_TN: Array
    ) -> None:
        def call() -> None:
            for t, number in enumerate(adapter_T):
                for f in adapters.adapters[number] if number >= 0 else ():
                    down, up = (m.dequantize().astype(self.dtype) for m in (f.down, f.up))
                    start, stop = f.columns
                    out_TN[t, start:stop] += up @ (
                        down @ x_TK[t].astype(self.dtype) * self.dtype.type(f.scale)
                    )

        self._do(call)
