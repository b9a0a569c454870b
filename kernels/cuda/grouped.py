"""Several matrices of one shape on a GPU, and products of each row with one of them: experts, heads.

Shape legend: C matrices, N outputs and K inputs of each, P pairs of a row and a matrix, E hidden, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flm.kernels.cuda.check import check
from flm.kernels.cuda.graph import GraphDevice
from flm.kernels.cuda.kernel import Device, Kernel, instance
from flm.kernels.cuda.linear import embedding
from flm.kernels.cuda.pack import NUMBERS, CudaMatrix, pack
from flm.kernels.errors import ShapeError
from flm.kernels.quant import QuantizedMatrix, from_float

Array = Any
THREADS = 256
FEW = 64  # tokens up to which blocks look for their pairs themselves
UNIT = 64  # pairs that a block of the tiled form handles


@dataclass(frozen=True, eq=False)
class CudaGroup:
    """C matrices [N, K] in one piece: `first` has the layout of each, its arrays those of all, with C in front.

    gated: tiles have eight gates and eight ups (gated.h), N counts features.
    """

    count: int
    first: CudaMatrix
    outputs: int
    gated: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.count, self.outputs, self.first.shape[1])

    @property
    def nbytes(self) -> int:
        return self.first.nbytes

    @property
    def row_tiles(self) -> int:
        return int(self.first.codes.shape[1])

    @property
    def k_tiles(self) -> int:
        return int(self.first.codes.shape[2])

    @property
    def scale_type(self) -> str:
        """The C++ type of a scale with its offset."""
        scales = self.first.scales
        if scales is None:
            return "float"
        single = "__half" if scales.dtype == np.float16 else "float"
        return single if scales.ndim == 4 else f"{single}2"


class HostArrays:
    """What pack() takes for a device where its arrays are to stay on the host."""

    def asarray(self, host: Array) -> Array:
        return host

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return np.empty(shape, dtype)


def interleaved(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """Gates over ups [2F, K] as tiles of eight gates and eight ups; where F is no multiple of 8, some rows twice."""
    width = matrix.shape[0] // 2
    features = np.minimum(np.arange(-(-width // 8) * 8), width - 1).reshape(-1, 1, 8)
    return matrix.permute_rows((features + np.array([0, width]).reshape(1, 2, 1)).reshape(-1))


def pack_group(
    matrices: Sequence[CudaMatrix], device: GraphDevice, outputs: int, gated: bool = False
) -> CudaGroup:
    """Matrices packed on the host (HostArrays), moved to the device. Where they are not of one format, or have groups of
    scattered inputs, all become 16-bit floats."""
    kinds = {
        (m.format, m.group, m.columns, None if m.scales is None else (m.scales.dtype, m.scales.ndim))
        for m in matrices
    }
    if len(kinds) > 1 or any(m.gather is not None for m in matrices):
        matrices = [_widened(m, device) for m in matrices]
    one = matrices[0]
    stack = lambda arrays: device.asarray(np.stack(arrays))
    scales = None if one.scales is None else stack([m.scales for m in matrices])
    first = replace(one, codes=stack([m.codes for m in matrices]), scales=scales)
    return CudaGroup(len(matrices), first, outputs, gated)


def _widened(matrix: CudaMatrix, device: GraphDevice) -> CudaMatrix:
    """A matrix of the host as 16-bit floats."""
    move = lambda array: None if array is None else device.asarray(array)
    there = replace(
        matrix,
        codes=device.asarray(matrix.codes),
        scales=move(matrix.scales),
        gather=move(matrix.gather),
    )
    rows = device.empty(matrix.shape, "float32")
    if matrix.gather is not None:
        rows[...] = 0  # inputs that no group has
    embedding(device, there, device.asarray(np.arange(matrix.shape[0], dtype=np.int32)), rows)
    return pack(from_float(device.download(rows)), matrix.dtype, HostArrays())


@dataclass(frozen=True, eq=False)
class Pairs:
    """P pairs: pair p takes row p // divide of x and gives row p of out. Its matrix is number ids[p] - first, those outside
    of 0..C having none; without ids it is p % C. tokens: at most so many pairs of one matrix. plan: int32, see expert_plan.cu,
    needed for more than FEW tokens."""

    count: int
    tokens: int
    divide: int = 1
    ids: Array | None = None
    first: int = 0
    plan: Array | None = None


def plan_size(pairs: int, count: int) -> int:
    """Elements of a plan."""
    return count + 2 + 2 * most_units(pairs, count) + pairs


def most_units(pairs: int, count: int) -> int:
    """Pieces that so many pairs of `count` matrices can have."""
    return pairs // UNIT + min(pairs, count)


def plan_kernel() -> Kernel:
    """The one instance."""
    return instance("expert_plan.cu", "expert_plan")


def make_plan(device: Device, pairs: Pairs, count: int) -> None:
    """Fill pairs.plan for `count` matrices."""
    if count > 1024:
        raise ShapeError(f"at most 1,024 experts expected, got {count}")
    check("plan", pairs.plan, (plan_size(pairs.count, count),), "int32")
    units = most_units(pairs.count, count)
    args = [pairs.ids, pairs.count, pairs.first, count, units, pairs.plan]
    device.launch(plan_kernel(), (1,), 1024, args)


def kernel(weight: CudaGroup, out: str, rows: int) -> Kernel:
    """The instance for few rows a matrix that makes 16 * rows of its rows a block."""
    m = weight.first
    number, scale = NUMBERS[m.format], weight.scale_type
    return instance(
        "grouped_linear.cu", "grouped_linear", m.dtype, out, number, scale, m.group, rows, weight.gated
    )


def tiled_kernel(weight: CudaGroup, out: str) -> Kernel:
    """The instance for many rows a matrix."""
    m = weight.first
    number, scale = NUMBERS[m.format], weight.scale_type
    return instance("tiled_grouped.cu", "tiled_grouped", m.dtype, out, number, scale, m.group, weight.gated)


def product(device: Device, x_RK: Array, weight: CudaGroup, out_PN: Array, pairs: Pairs) -> None:
    """out[p] = x[p // divide] @ matrix.T, or of a gated group silu(gate) * up; rows of pairs without a matrix stay as they are.

    x [rows, >= K], the type that the weight was packed for; out [P, >= N], that or float32. A pair's bits depend on its row
    and its matrix alone.
    """
    m, (C, N, K) = weight.first, weight.shape
    x_lead, out_lead = int(x_RK.shape[1]), int(out_PN.shape[1])
    if x_lead < K or out_lead < N or x_lead % 4:
        raise ShapeError(f"x of at least {K} columns, out of {N} expected, got {x_lead} and {out_lead}")
    check("x", x_RK, (-(-pairs.count // pairs.divide), x_lead), m.dtype)
    out = check("out", out_PN, (pairs.count, out_lead), m.dtype, "float32")
    if not pairs.count:
        return
    starts = units = order = None
    if pairs.plan is not None:
        U = most_units(pairs.count, C)
        starts, units, order = pairs.plan, pairs.plan[C + 2 :], pairs.plan[C + 2 + 2 * U :]
    sizes = [pairs.divide, N, K, x_lead, out_lead, weight.row_tiles, weight.k_tiles, m.span]
    arrays = [x_RK, m.codes, m.scales, out_PN]
    many = pairs.tokens > FEW if pairs.ids is not None else pairs.tokens > UNIT // 4
    if many and K % 8 == 0 and x_lead % 8 == 0:
        blocks = most_units(pairs.count, C) if order is not None else C * -(-pairs.tokens // UNIT)
        args = [*arrays, starts, units, order, pairs.count, C, *sizes]
        device.launch(tiled_kernel(weight, out), (-(-weight.row_tiles // 8), blocks), THREADS, args)
        return
    blocks = C if pairs.ids is None or order is not None else min(pairs.count, C)
    rows = next((r for r in (4, 2) if weight.row_tiles * blocks >= 2 * r * device.processors), 1)
    args = [*arrays, pairs.ids, starts, order, pairs.count, C, pairs.first, *sizes]
    device.launch(kernel(weight, out, rows), (-(-weight.row_tiles // rows), blocks), THREADS, args)
