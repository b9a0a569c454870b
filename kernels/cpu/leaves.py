"""Leaves: the micro-kernels behind C function pointers, each compiled once and cached by itself.

Ops call them by address (a field of their program row), so a change in an op recompiles no kernel, and only the weight
forms in use are ever compiled.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from flm.kernels.cpu.ir import I64
from flm.kernels.cpu.microkernels import (
    BFLOAT16,
    FLOAT8,
    FLOAT16,
    FLOAT32,
    INT4,
    INT8,
    MAX_TOKENS,
    affine,
    convert,
    plain,
)

AFFINE = types.void(*[types.int64] * 15)
PLAIN = types.void(*[types.int64] * 9)
CONVERT = types.void(*[types.int64] * 3)


@intrinsic
def call_leaf(ctx, address, arguments):  # type: ignore
    """Call a C function by address with a tuple of int64 arguments; it returns nothing."""
    count = arguments.count

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64] * count)
        values = [b.extract_value(args[1], i) for i in range(count)]
        b.call(b.inttoptr(args[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, count)), codegen


@intrinsic
def call_op(ctx, address, row, worker):  # type: ignore
    """Call an op: a C function from the address of a program row and a worker's number to a status."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(I64, [I64, I64])
        return b.call(b.inttoptr(args[0], kind.as_pointer()), [args[1], args[2]])

    return types.int64(types.int64, types.int64, types.int64), codegen


@cfunc(AFFINE, cache=True)
def affine_int4(T, lane, lanes, w, w_group, x, x_group, k, G, out, scales, offsets, half, xsum, xsum_group):  # type: ignore
    blocks = (T + MAX_TOKENS - 1) // MAX_TOKENS
    while T > 0:
        n = (T + blocks - 1) // blocks  # even blocks: small ones run slower
        blocks -= 1
        affine(
            INT4, n, lane, lanes, w, w_group, x, x_group, k, G, out, scales, offsets, half, xsum, xsum_group
        )
        T, x, out, xsum = T - n, x + n * k * 4, out + n * 256, xsum + n * 4


@cfunc(AFFINE, cache=True)
def affine_int8(T, lane, lanes, w, w_group, x, x_group, k, G, out, scales, offsets, half, xsum, xsum_group):  # type: ignore
    blocks = (T + MAX_TOKENS - 1) // MAX_TOKENS
    while T > 0:
        n = (T + blocks - 1) // blocks  # even blocks: small ones run slower
        blocks -= 1
        affine(
            INT8, n, lane, lanes, w, w_group, x, x_group, k, G, out, scales, offsets, half, xsum, xsum_group
        )
        T, x, out, xsum = T - n, x + n * k * 4, out + n * 256, xsum + n * 4


@cfunc(AFFINE, cache=True)
def affine_fp8(T, lane, lanes, w, w_group, x, x_group, k, G, out, scales, offsets, half, xsum, xsum_group):  # type: ignore
    blocks = (T + MAX_TOKENS - 1) // MAX_TOKENS
    while T > 0:
        n = (T + blocks - 1) // blocks
        blocks -= 1
        affine(
            FLOAT8, n, lane, lanes, w, w_group, x, x_group, k, G, out, scales, offsets, half, xsum, xsum_group
        )
        T, x, out, xsum = T - n, x + n * k * 4, out + n * 256, xsum + n * 4


@cfunc(AFFINE, cache=True)
def affine_tile(T, lane, lanes, w, w_group, x, x_group, k, G, out, scales, offsets, half, xsum, xsum_group):  # type: ignore
    """Any number of tokens over one group's codes that a convert leaf has turned to float."""
    blocks = (T + MAX_TOKENS - 1) // MAX_TOKENS
    while T > 0:
        n = (T + blocks - 1) // blocks  # even blocks: small ones run slower
        blocks -= 1
        affine(
            FLOAT32,
            n,
            lane,
            lanes,
            w,
            w_group,
            x,
            x_group,
            k,
            G,
            out,
            scales,
            offsets,
            half,
            xsum,
            xsum_group,
        )
        T, x, out, xsum = T - n, x + n * k * 4, out + n * 256, xsum + n * 4


@cfunc(CONVERT, cache=True)
def convert_int4(codes, tile, k):  # type: ignore
    convert(INT4, codes, tile, k)


@cfunc(CONVERT, cache=True)
def convert_int8(codes, tile, k):  # type: ignore
    convert(INT8, codes, tile, k)


@cfunc(CONVERT, cache=True)
def convert_fp8(codes, tile, k):  # type: ignore
    convert(FLOAT8, codes, tile, k)


@cfunc(PLAIN, cache=True)
def plain_float32(T, lanes, w, w_stride, x, x_stride, k, out, out_stride):  # type: ignore
    """out [T, lanes] += x [T, k] @ w [k, lanes], any T."""
    blocks = (T + MAX_TOKENS - 1) // MAX_TOKENS
    while T > 0:
        n = (T + blocks - 1) // blocks
        blocks -= 1
        plain(FLOAT32, n, lanes, w, w_stride, x, x_stride, k, out, out_stride)
        T, x, out = T - n, x + n * x_stride, out + n * out_stride


@cfunc(PLAIN, cache=True)
def plain_float16(T, lanes, w, w_stride, x, x_stride, k, out, out_stride):  # type: ignore
    blocks = (T + MAX_TOKENS - 1) // MAX_TOKENS
    while T > 0:
        n = (T + blocks - 1) // blocks
        blocks -= 1
        plain(FLOAT16, n, lanes, w, w_stride, x, x_stride, k, out, out_stride)
        T, x, out = T - n, x + n * x_stride, out + n * out_stride


@cfunc(PLAIN, cache=True)
def plain_bfloat16(T, lanes, w, w_stride, x, x_stride, k, out, out_stride):  # type: ignore
    blocks = (T + MAX_TOKENS - 1) // MAX_TOKENS
    while T > 0:
        n = (T + blocks - 1) // blocks
        blocks -= 1
        plain(BFLOAT16, n, lanes, w, w_stride, x, x_stride, k, out, out_stride)
        T, x, out = T - n, x + n * x_stride, out + n * out_stride


LEAVES = (
    affine_int4, affine_int8, affine_fp8, affine_tile, convert_int4, convert_int8, convert_fp8, plain_float32,
    plain_float16, plain_bfloat16,
)  # fmt: skip
