"""A safetensors directory with quantised layers, as tensors under the checkpoint's own names.

The parts of a layer (qweight, scales, …) are hidden, and its weight is there as a matrix in its own precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from flm.kernels.cores import usable_cpus
from flm.kernels.errors import KernelError
from flm.kernels.quant import QuantizedMatrix
from flm.worker.config import Span
from flm.worker.errors import CheckpointError
from flm.worker.files.safetensors_file import TensorFile
from flm.worker.packing.module import Module, Packing
from flm.worker.tensors.precision import fuse, row_pieces
from flm.worker.tensors.tensor_source import SafetensorsSource, Storage

AT_ONCE = 1 << 22  # weights
WIDE = 512  # outputs at once where the file's rows are inputs: pieces of those are not too short then
THREADS = 4
CACHE_SCALES = ("q_scale", "k_scale", "v_scale", "kv_scale")  # caches here are of other types, and need none
ROWS_APART = 64  # pieces begin at rows that every packing's words begin at


class PackedSource(SafetensorsSource):
    """SafetensorsSource in which `packing` says what quantised layers hold."""

    def __init__(self, directory: Path, tensors: Mapping[str, TensorFile], packing: Packing) -> None:
        super().__init__(directory, tensors)
        self._packing = packing
        self._modules = {stem + "weight": module for stem, module in self._find(tensors)}
        self._storage: dict[str, Storage] = {}
        parts = {module.stem + part for module in self._modules.values() for part in packing.parts}
        self._names = [name for name in tensors if name not in parts] + list(self._modules)

    def _find(self, tensors: Mapping[str, TensorFile]) -> Iterable[tuple[str, Module]]:
        for stem in dict.fromkeys(name.rpartition(".")[0] + "." for name in tensors):
            module = Module(tensors, stem)
            if self._packing.packs(module):
                yield stem, module

    def names(self) -> Iterable[str]:
        """Without the biases of zeros that packers write beside weights that have none, and the scales of a cache in fp8."""
        return self._in_use

    @cached_property
    def _in_use(self) -> list[str]:
        return [name for name in self._names if not self._is_idle(name)]

    def _is_idle(self, name: str) -> bool:
        stem, _, kind = name.rpartition(".")
        if kind in CACHE_SCALES:
            return True
        beside = kind == "bias" and f"{stem}.weight" in self._modules
        return beside and not self._tensors[name].read(name).any()

    def has(self, name: str) -> bool:
        return name in self._modules or super().has(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._packing.shape(self._modules[name]) if name in self._modules else super().shape(name)

    def storage(self, name: str) -> Storage:
        if name not in self._modules:
            return super().storage(name)
        if name not in self._storage:
            try:
                self._storage[name] = self._packing.storage(self._modules[name])
            except KernelError as error:
                raise CheckpointError(str(self._directory), f"tensor {name!r}: {error}") from error
        return self._storage[name]

    def matrix(self, name: str, rows: Span, cols: Span) -> QuantizedMatrix:
        if name not in self._modules:
            return super().matrix(name, rows, cols)
        module, step, by_rows = self._modules[name], ROWS_APART, self.storage(name).by_rows
        at_once = AT_ONCE if by_rows else max(AT_ONCE, WIDE * cols.size)

        def piece(bounds: tuple[int, int]) -> QuantizedMatrix:
            span = Span(rows.start + bounds[0] * step, min(rows.start + bounds[1] * step, rows.stop))
            return self._packing.matrix(module, span, cols)

        bounds = list(row_pieces(-(-rows.size // step), cols.size * step, at_once))
        if by_rows or len(bounds) == 1:
            pieces = [piece(each) for each in bounds]
        else:
            with ThreadPoolExecutor(min(THREADS, usable_cpus())) as pool:
                pieces = list(pool.map(piece, bounds))
        return pieces[0] if len(pieces) == 1 else fuse(pieces)

    def will_read(self, name: str, rows: Span, cols: Span) -> None:
        """All parts of a quantised layer: other ranks of this machine want the rest, and the disk reads each page once."""
        if name not in self._modules:
            super().will_read(name, rows, cols)
            return
        module = self._modules[name]
        for part in self._packing.parts:
            if module.has(part):
                module.will_read(part)
