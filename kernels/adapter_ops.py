"""AdapterOps: what a backend needs beside `Backend` to serve low-rank adapters (LoRA, arXiv:2106.09685), many in one step.

Shape legend: T tokens, K inputs, N outputs, R rank of an adapter, W columns of a token's room. What backend.py says of every
op holds here too: a token's result depends on its row and its adapter alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from flm.kernels.errors import ShapeError, UnsupportedFormat
from flm.kernels.quant import FLOAT_DTYPES, QuantizedMatrix

Array = Any


@dataclass(frozen=True, eq=False)
class Factors:
    """What an adapter adds to some columns of a product: out[:, start : start + N] += scale * (x @ down.T) @ up.T.

    down [R, K], up [N, R]: float32, float16 or bfloat16."""

    down: QuantizedMatrix
    up: QuantizedMatrix
    scale: float
    start: int = 0

    def __post_init__(self) -> None:
        if self.down.shape[0] != self.up.shape[1]:
            raise ShapeError(f"factors of one rank expected, got {self.down.shape} and {self.up.shape}")
        for matrix in (self.down, self.up):
            if matrix.format not in FLOAT_DTYPES:
                raise UnsupportedFormat(f"factors in {', '.join(FLOAT_DTYPES)} expected, got {matrix.format}")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def columns(self) -> tuple[int, int]:
        """The first column of out that it adds to, and the one after the last."""
        return self.start, self.start + self.up.shape[0]


class PackedAdapters(Protocol):
    """What all adapters add to one product, in one backend's layout."""

    @property
    def width(self) -> int:
        """float32 columns of room that `adapt` needs for each token."""
        ...

    @property
    def nbytes(self) -> int: ...


@runtime_checkable
class AdapterOps(Protocol):
    """A backend without them cannot serve adapters."""

    def pack_adapters(self, adapters: Sequence[Sequence[Factors]]) -> PackedAdapters:
        """For each adapter its factors of one product, none where it leaves the product alone; no two of an adapter add to
        the same columns."""
        ...

    def adapt(
        self, x_TK: Array, adapters: PackedAdapters, adapter_T: Array, room_TW: Array, out_TN: Array
    ) -> None:
        """out[t] += what adapter number adapter[t] adds for x[t]. Rows of tokens without one (-1) stay as they are, to the bit.

        adapter: int32. room: float32, overwritten. out must overlap neither."""
        ...
