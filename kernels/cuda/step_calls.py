"""What the engine asks of a GPU beside a model's ops: inputs of a step, sizes of captured steps, free memory, collectives.

Collectives go through the memory of the host: correct, and slow. Sums are float32, in rank order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.cuda import all_reduce
from flm.kernels.cuda.graph import CudaGraph, GraphDevice
from flm.kernels.cuda.kernel_list import KernelList
from flm.kernels.cuda.staging import CudaStaged, scatter_kernel
from flm.kernels.errors import ShapeError
from flm.kernels.group import Group
from flm.kernels.staging import DeviceMemory

Array = Any
STEP = 8  # rows that the matrix product handles at once
ACTIVATION = "bfloat16"  # unless another is asked for


def kv_dtypes(activation: str = ACTIVATION) -> tuple[str, ...]:
    """The dtypes of caches beside that activation, the usual one first."""
    return activation, "int8"


class StepCalls:
    """A part of CudaBackend. A captured step that has one of these collectives is replayed op by op."""

    device: GraphDevice
    activation: str
    _graph: CudaGraph | None

    @property
    def kv_dtypes(self) -> tuple[str, ...]:
        return kv_dtypes(self.activation)

    def decode_sizes(self, most: int) -> tuple[int, ...]:
        small = [size for size in (1, 2, 4) if size < most]
        return (*small, *range(STEP, most, STEP), most)

    def memory(self) -> DeviceMemory | None:
        return self.device.memory()

    def prepare(self, steps: Callable[[], None], ranks: int, on_progress: Callable[[float], None]) -> None:
        device = self.device
        self.device = listing = KernelList(device)
        try:
            steps()
        finally:
            self.device = device
        crossing = all_reduce.kernels(self.activation) if ranks > 1 else []
        kernels = [*listing.kernels, scatter_kernel(), *crossing]
        device.prepare(kernels, lambda done, count, _: on_progress(done / count))

    def staged(self, arrays: Mapping[str, NDArray[Any]], table: NDArray[np.int32]) -> CudaStaged:
        return CudaStaged(self.device, arrays, table)

    def in_order(self, call: Callable[[], None], waits: bool = False) -> None:
        """Make a call in order with ops, or record it. waits: it waits for the GPU."""
        if self._graph is None:
            call()
            return
        self._graph.calls.append(call)
        self._graph.waits |= waits

    def _through_host(self, array: Array, exchange: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        def call() -> None:
            self.device.upload(exchange(self.device.download(array)), array)

        self.in_order(call, waits=True)

    def all_reduce(self, group: Group, x: Array) -> None:
        def exchange(mine: NDArray[Any]) -> NDArray[Any]:
            return sum_ranks(_gather(group, mine)).astype(mine.dtype).reshape(mine.shape)

        self._through_host(x, exchange)

    def all_gather_cols(self, group: Group, x_SN: Array, out_SN: Array, widths: tuple[int, ...]) -> None:
        if len(widths) != group.size or tuple(out_SN.shape) != (len(x_SN), sum(widths)):
            raise ShapeError(
                f"{group.size} widths that add up to {out_SN.shape[1]} columns expected, got {widths}"
            )
        rows, widest = len(x_SN), max(widths)

        def call() -> None:
            mine = self.device.download(x_SN)
            padded = np.zeros((rows, widest), mine.dtype)
            padded[:, : mine.shape[1]] = mine
            parts = [part.reshape(rows, widest) for part in _gather(group, padded)]
            whole = np.concatenate([p[:, :w] for p, w in zip(parts, widths, strict=True)], axis=1)
            self.device.upload(whole, out_SN)

        self.in_order(call, waits=True)

    def broadcast(self, group: Group, x: Array, root: int = 0) -> None:
        self._through_host(x, lambda mine: _gather(group, mine)[root].reshape(mine.shape))

    def barrier(self, group: Group) -> None:
        self.in_order(lambda: _barrier(group), waits=True)


def _barrier(group: Group) -> None:
    group.exchange(np.zeros(0, np.uint8))


def _gather(group: Group, mine: NDArray[Any]) -> list[NDArray[Any]]:
    """Every rank's elements, flat, in rank order. All ranks have as many."""
    flat, step = np.ascontiguousarray(mine).reshape(-1), group.slot_bytes // mine.itemsize
    wholes = [np.empty_like(flat) for _ in range(group.size)]
    for start in range(0, flat.size, step):
        piece = flat[start : start + step]
        epoch = group.exchange(piece)
        for rank, whole in enumerate(wholes):
            whole[start : start + step] = group.slot(rank, epoch)[: piece.nbytes].view(flat.dtype)
    return wholes


def sum_ranks(parts: list[NDArray[Any]]) -> NDArray[np.float32]:
    """float32, added in order."""
    total = parts[0].astype(np.float32)
    for part in parts[1:]:
        total += part.astype(np.float32)
    return total
