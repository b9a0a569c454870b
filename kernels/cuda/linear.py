"""Products with packed weights on a GPU. Shape legend: M rows (tokens), K inputs, N outputs."""

from __future__ import annotations

from flm.kernels.cuda.check import ACTIVATIONS, Array, check, dimensions
from flm.kernels.cuda.kernel import Device, Kernel, instance
from flm.kernels.cuda.pack import NUMBERS, STEPS, CudaMatrix

THREADS = 256
FEW = 16  # rows of x up to which warps share K rather than outputs
WARPS = THREADS // 32
SMALL_TILE = 1, 4  # see tiled_tile


def kernel(weight: CudaMatrix, out: str, rows: int, cols: int) -> Kernel:
    """The instance that makes 16 * rows outputs of 8 * cols rows of x a block."""
    number, scale = NUMBERS[weight.format], weight.scale_type
    return instance("linear.cu", "linear", weight.dtype, out, number, scale, weight.group, rows, cols)


def tiled_kernel(weight: CudaMatrix, out: str, rows: int, along: int) -> Kernel:
    """The instance for many rows of x. See tiled_tile."""
    number, scale = NUMBERS[weight.format], weight.scale_type
    parameters = weight.dtype, out, number, scale, weight.group, rows, along
    return instance("tiled_linear.cu", "tiled_linear", *parameters)


def tile(N: int, M: int, processors: int) -> tuple[int, int]:
    """Row tiles and column tiles of a block: as many rows as leave every processor with a block and a half, and hardly
    more work on the busiest than single tiles would."""
    if M > 8:
        return 4, 2
    tiles = -(-N // 16)
    busiest = lambda rows: -(-tiles // (rows * processors)) * rows
    fits = lambda rows: tiles >= 1.5 * rows * processors and busiest(rows) <= 1.05 * busiest(1)
    return next((rows for rows in (4, 2) if fits(rows)), 1), 1


def tiled_tile(format: str, N: int, M: int, processors: int) -> tuple[int, int]:
    """Row tiles of a warp, and warps of a block along the outputs; the others lie along x with 32 rows each. Weights with
    scales leave registers for fewer sums. Small tiles where large ones leave processors without a block."""
    large = (4, 2) if format == "float" else (2, 4)
    outputs, rows = tiled_block(*large)
    return large if -(-N // outputs) * -(-M // rows) >= processors else SMALL_TILE


def tiled_block(rows: int, along: int) -> tuple[int, int]:
    """Outputs and rows of x of a block."""
    return 16 * rows * along, 32 * WARPS // along


def tiled_memory(format: str, rows: int, along: int) -> int:
    """Bytes of shared memory of a block: see Stage in tiled_linear.cu."""
    pieces = rows * along * 4 // STEPS[format] * 32 + tiled_block(rows, along)[1] * 8
    return 16 * pieces * (3 if format == "float" else 4)


def linear(
    device: Device,
    x_MK: Array,
    weight: CudaMatrix,
    out_MN: Array,
    bias_N: Array | None = None,
    accumulate: bool = False,
) -> None:
    """out = x @ weight.T (+ bias), or out += that where accumulate. out must not overlap x.

    x: the type that the weight was packed for, its columns those of the weight's codes (take_columns); out: that or float32; bias: float32.
    An output's bits depend on its row of x and its row of the weight alone.
    """
    M = dimensions("x", x_MK, 2)[0]
    N = weight.shape[0]
    check("x", x_MK, (M, weight.columns), weight.dtype)
    out = check("out", out_MN, (M, N), weight.dtype, "float32")
    if bias_N is not None:
        check("bias", bias_N, (N,), "float32")
    if not M or not N:
        return
    args = [
        x_MK,
        weight.codes,
        weight.scales,
        bias_N,
        out_MN,
        M,
        N,
        weight.columns,
        weight.k_tiles,
        weight.span,
    ]
    args.append(int(accumulate))
    if M > FEW and weight.columns % 8 == 0:
        shape = tiled_tile(weight.format, N, M, device.processors)
        outputs, rows = tiled_block(*shape)
        memory = tiled_memory(weight.format, *shape)
        device.launch(
            tiled_kernel(weight, out, *shape), (-(-N // outputs), -(-M // rows)), THREADS, args, memory
        )
        return
    rows, cols = tile(N, M, device.processors)
    grid = (-(-N // (16 * rows)), -(-M // (8 * cols)))
    device.launch(kernel(weight, out, rows, cols), grid, THREADS, args)


def embedding_kernel(weight: CudaMatrix, out: str) -> Kernel:
    """The instance for this weight."""
    number, scale = NUMBERS[weight.format], weight.scale_type
    return instance("embedding.cu", "embedding", weight.dtype, out, number, scale, weight.group)


def embedding(
    device: Device, weight: CudaMatrix, ids_T: Array, out_TE: Array, first_row: int = 0, scale: float = 1.0
) -> None:
    """out[t] = scale * weight[ids[t] - first_row]; zeros where that is outside of 0..N. ids: int32.

    With ids 0..N it dequantises the matrix. out: float32 or the type that the weight was packed for.
    """
    T, (N, E) = dimensions("ids", ids_T, 1)[0], weight.shape
    check("ids", ids_T, (T,), "int32")
    out = check("out", out_TE, (T, E), weight.dtype, "float32")
    if T and E:
        args = [
            weight.codes,
            weight.scales,
            weight.gather,
            ids_T,
            out_TE,
            N,
            E,
            weight.columns,
            weight.k_tiles,
        ]
        grid = (T, -(-weight.columns // (4 * THREADS)))
        device.launch(embedding_kernel(weight, out), grid, THREADS, [*args, first_row, float(scale)])


def take_columns_kernel() -> Kernel:
    """The one instance."""
    return instance("take_columns.cu", "take_columns")


def take_columns(device: Device, x_MK: Array, gather: Array, out_MC: Array) -> None:
    """out[m][c] = x[m][gather[c]], zero where gather is -1: x in the order of a weight's groups. 16-bit types."""
    (M, K), C = dimensions("x", x_MK, 2), dimensions("gather", gather, 1)[0]
    kind = check("x", x_MK, (M, K), *ACTIVATIONS)
    check("gather", gather, (C,), "int32")
    check("out", out_MC, (M, C), kind)
    if M and C:
        device.launch(take_columns_kernel(), (M, -(-C // THREADS)), THREADS, [x_MK, gather, out_MC, K, C])
