"""The tensors of one quantised linear layer, and what a packing knows of them.

Shape legend: N outputs (rows), K inputs (columns).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flm.kernels.quant import QuantizedMatrix, to_float32
from flm.worker.config import Span
from flm.worker.errors import CheckpointError
from flm.worker.files.safetensors_file import TensorEntry, TensorFile
from flm.worker.tensors.tensor_source import Storage

Array = NDArray[Any]


@dataclass(frozen=True)
class Module:
    """The layer whose tensors begin with `stem`, e.g. "model.layers.0.mlp.up_proj."."""

    tensors: Mapping[str, TensorFile]
    stem: str

    def has(self, part: str) -> bool:
        return self.stem + part in self.tensors

    def entry(self, part: str) -> TensorEntry:
        """Raises CheckpointError where the tensor is missing."""
        name = self.stem + part
        if name not in self.tensors:
            beside = next(iter(self.tensors.values()))
            raise CheckpointError(str(beside.path.parent), f"tensor {name!r} is missing")
        return self.tensors[name].tensors[name]

    def shape(self, part: str, dims: int = 2) -> tuple[int, ...]:
        """The part's shape, with as many dimensions as expected."""
        found = self.entry(part).shape
        if len(found) != dims:
            raise self.fail(part, f"{dims} dimensions expected, found shape {list(found)}")
        return found

    def read(self, part: str, rows: Span | None = None, cols: Span | None = None) -> Array:
        """A view of the part or of a piece of it; bfloat16 and float8 as their bits."""
        self.entry(part)
        return self.tensors[self.stem + part].read(self.stem + part, rows, cols)

    def will_read(self, part: str) -> None:
        """Begin to read all of the part."""
        self.tensors[self.stem + part].will_read(self.stem + part)

    def scales(self, part: str, rows: Span | None = None, cols: Span | None = None) -> Array:
        """Scales: float16 as they are, bfloat16 and float32 as float32."""
        kind, values = self.entry(part).dtype, self.read(part, rows, cols)
        if kind not in ("F16", "BF16", "F32"):
            raise self.fail(part, f"F16, BF16 or F32 expected, found {kind}")
        return to_float32(values, "bfloat16") if kind == "BF16" else np.array(values)

    def nbytes(self, parts: tuple[str, ...]) -> int:
        """Bytes of those of the parts that are there."""
        return sum(self.entry(part).nbytes for part in parts if self.has(part))

    def check(self, part: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError with both where dtype or shape is another."""
        entry = self.entry(part)
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise self.fail(part, f"{dtype} {list(shape)} expected, found {entry.dtype} {list(entry.shape)}")

    def fail(self, part: str, message: str) -> CheckpointError:
        file = self.tensors[self.stem + part].path
        return CheckpointError(str(file), f"tensor {self.stem + part!r}: {message}")


class Packing(Protocol):
    """How a checkpoint keeps the weights of quantised layers. `parts`: the tensors that stand for one weight; a layer
    that has the first of them, and `packs`, is quantised."""

    @property
    def parts(self) -> tuple[str, ...]: ...
    def packs(self, module: Module) -> bool: ...
    def shape(self, module: Module) -> tuple[int, int]:
        """(N, K). Raises CheckpointError where the parts' shapes do not belong together."""
        ...

    def storage(self, module: Module) -> Storage:
        """Its group is what columns can be cut by."""
        ...

    def matrix(self, module: Module, rows: Span, cols: Span) -> QuantizedMatrix:
        """A piece, from which only the pages of that piece are read. `cols` begins and ends on borders of the storage's
        group, or ends with the last column."""
        ...
