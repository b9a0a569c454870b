"""Products of many rows by a library: weights are unpacked into scratch memory, strip by strip, and multiplied by cuBLASLt.

Which of its kernels the library takes, and so how a sum over K is cut, depends on the number of rows: a token's bits then
depend on how many others share its step. Weights are rounded to the activations' type. Shape legend: M rows of x, N outputs,
K inputs.
"""

from __future__ import annotations

import logging
from typing import Any

from flm.kernels.cuda.check import address_of, check, dtype_name
from flm.kernels.cuda.cublas_lt import ALIGNMENT, CublasLt, Product, Shape, load_library
from flm.kernels.cuda.graph import GraphDevice
from flm.kernels.cuda.kernel import Device, Kernel, instance
from flm.kernels.cuda.pack import NUMBERS, CudaMatrix

Array = Any
FEW = (
    256  # rows of x up to which our own tiles are at hand: below, unpacking costs more than the library saves
)
SCRATCH = 256 << 20  # bytes, of unpacked weights
WORKSPACE = 32 << 20  # bytes, of the library
MOST_BYTES = SCRATCH + WORKSPACE
STRIP = 128  # outputs, of which strips have a multiple
THREADS = 256
log = logging.getLogger(__name__)


def dequantize_kernel(weight: CudaMatrix) -> Kernel:
    """The instance for this weight."""
    number, scale = NUMBERS[weight.format], weight.scale_type
    return instance("dequantize.cu", "dequantize", weight.dtype, number, scale, weight.group)


def dequantize(device: Device, weight: CudaMatrix, start: int, out_RK: Array) -> None:
    """out = rows start.. of the weight, rounded to its activations' type; columns in the order of its codes.

    start: a multiple of 16. out [R, columns], R at most the rows that are left.
    """
    rows, columns = len(out_RK), weight.columns
    assert start % 16 == 0 and start + rows <= weight.shape[0], (start, rows, weight.shape)
    check("out", out_RK, (rows, columns), weight.dtype)
    grid = (-(-weight.k_tiles // 8), -(-rows // 16))
    args = [weight.codes, weight.scales, out_RK, start // 16, rows, columns, weight.k_tiles]
    device.launch(dequantize_kernel(weight), grid, THREADS, args)


def start_bias_kernel(out: str) -> Kernel:
    """The instance for outputs of this type."""
    return instance("start_bias.cu", "start_bias", out)


def strips(N: int, K: int) -> list[tuple[int, int]]:
    """Where strips of outputs begin and end: as few as scratch memory allows, about as long."""
    most = max(SCRATCH // (2 * K) // STRIP, 1) * STRIP
    count = -(-N // most)
    length = -(-N // (count * STRIP)) * STRIP
    return [(at, min(at + length, N)) for at in range(0, N, length)]


def bucket(rows: int) -> tuple[int, int]:
    """The least and the most rows that share an algorithm with so many."""
    high = 1 << (rows - 1).bit_length()
    return max(high // 2, FEW) + 1, high


class LibraryProducts:
    """Of one backend. Algorithms are chosen, and scratch memory is taken, when a matrix is first multiplied with so many
    rows, which a rank does for its largest step before it serves."""

    def __init__(self, library: CublasLt, device: Device) -> None:
        self._library, self._workspace = library, device.empty((WORKSPACE,), "uint8")
        self._scratch: dict[str, Array] = {}
        self._chosen: dict[tuple[Shape, int], Product | None] = {}

    def product(
        self,
        device: GraphDevice,
        x_MK: Array,
        weight: CudaMatrix,
        out_MN: Array,
        bias_N: Array | None,
        accumulate: bool,
    ) -> bool:
        """As linear.linear. False, and nothing done, where the library is not the one to take it: few rows, widths that are
        no multiple of 8, or a shape that it knows no algorithm for."""
        M, (N, K), out = len(x_MK), (weight.shape[0], weight.columns), dtype_name(out_MN.dtype)
        if M <= FEW or N % 8 or K % 8 or not N or any(address_of(a) % ALIGNMENT for a in (x_MK, out_MN)):
            return False
        check("x", x_MK, (M, K), weight.dtype)
        check("out", out_MN, (M, N), weight.dtype, "float32")
        parts = strips(N, K)
        shapes = [Shape(stop - start, K, N, weight.dtype, out) for start, stop in parts]
        chosen = [product for shape in shapes if (product := self._choose(shape, M)) is not None]
        if len(chosen) < len(parts):
            return False
        if bias_N is not None:
            check("bias", bias_N, (N,), "float32")
            args = [bias_N, out_MN, M, N, int(accumulate)]
            device.launch(start_bias_kernel(out), (-(-M * N // THREADS),), THREADS, args)
        add, x_at, out_at = accumulate or bias_N is not None, address_of(x_MK), address_of(out_MN)
        for (start, stop), product in zip(parts, chosen, strict=True):
            rows = self._room(device, weight.dtype, parts[0][1], stop - start, K)
            dequantize(device, weight, start, rows)
            places = address_of(rows), x_at, out_at + start * int(out_MN.dtype.itemsize)
            self._multiply(device, product, M, places, add)
        return True

    def _multiply(
        self, device: GraphDevice, product: Product, M: int, places: tuple[int, int, int], add: bool
    ) -> None:
        space = address_of(self._workspace)
        device.enqueue(lambda stream: self._library.multiply(product, M, places, add, space, stream))

    def _choose(self, shape: Shape, M: int) -> Product | None:
        """The algorithm for so many rows; those for fewer are chosen beside it."""
        wanted = bucket(M)
        low, high = wanted
        while (shape, high) not in self._chosen:
            self._chosen[shape, high] = made = self._library.choose(shape, low, high)
            if made is None:
                log.info(
                    "cuBLASLt knows no algorithm for %s and up to %d rows: our own tiles take it", shape, high
                )
            if high // 2 <= FEW:
                break
            low, high = bucket(high // 2)
        return self._chosen[shape, wanted[1]]

    def _room(self, device: GraphDevice, dtype: str, most: int, rows: int, K: int) -> Array:
        """[rows, K] of scratch memory, which grows to the longest strip, `most` rows, that any matrix has."""
        held = self._scratch.get(dtype)
        if held is None or held.size < most * K:
            self._scratch.pop(dtype, None)
            del held
            self._scratch[dtype] = held = device.empty((most * K,), dtype)
        return held[: rows * K].reshape(rows, K)


def open_library(device: Device, cuda: int) -> LibraryProducts:
    """cuBLASLt of CUDA's major version `cuda`. Raises ToolkitMissing, LibraryFailed, DeviceMemoryFull."""
    return LibraryProducts(CublasLt(load_library(cuda), WORKSPACE), device)
