"""Row operations in LLVM vector code: sums, maxima, exponentials. Fixed order over 16 lanes, then a fixed tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flm.kernels.cpu.ir import F32, I32, LANES, VF32, VI32, Loop, call, const, fma, i64, load, splat, store

# exp on [-ln 2 / 2, ln 2 / 2]: interpolation at Chebyshev nodes, degree 6
EXP_COEFFICIENTS = (
    1.0, 1.0, 0.5, 0.16666415333747864, 0.04166635125875473, 0.008375134319067001, 0.0013941118959337473,
)  # fmt: skip
LOG2_E, LN2_HIGH, LN2_LOW = 1.4426950216293335, 0.693359375, -0.00021219444170128554
EXP_MIN, EXP_MAX = -87.3, 88.0
GELU_SLOPE = 0.7978845608028654  # sqrt(2 / pi)
PRESCALE = [
    2.0 ** (-4 * j) if j < 7 else 1.0 for j in range(8)
] * 2  # see microkernels: int4 nibbles stay in place
Body = Callable[[Callable[[Any], Any], Callable[[Any, Any], None], list[Any]], list[Any]]


def exp(b: Any, x: Any) -> Any:
    """e^x, relative error below 2^-22; 0 below EXP_MIN, x clamped to EXP_MAX."""
    small = b.fcmp_ordered("<", x, const(VF32, EXP_MIN))
    x = b.select(b.fcmp_ordered("<", x, const(VF32, EXP_MAX)), x, const(VF32, EXP_MAX))
    x = b.select(small, const(VF32, EXP_MIN), x)
    n = call(b, "llvm.rint.v16f32", VF32, b.fmul(x, const(VF32, LOG2_E)))
    r = fma(b, n, const(VF32, -LN2_HIGH), x)
    r = fma(b, n, const(VF32, -LN2_LOW), r)
    y = const(VF32, EXP_COEFFICIENTS[-1])
    for c in EXP_COEFFICIENTS[-2::-1]:
        y = fma(b, y, r, const(VF32, c))
    power = b.bitcast(b.shl(b.add(b.fptosi(n, VI32), const(VI32, 127)), const(VI32, 23)), VF32)
    return b.select(small, const(VF32, 0.0), b.fmul(y, power))


def tree(b: Any, v: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Fold 16 lanes to one scalar, halves first."""
    width = LANES
    while width > 1:
        width //= 2
        pick = [ir.Constant(ir.VectorType(I32, width), list(range(at, at + width))) for at in (0, width)]
        v = combine(b.shuffle_vector(v, v, pick[0]), b.shuffle_vector(v, v, pick[1]))
    return b.extract_element(v, ir.Constant(I32, 0))


def larger(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def sweep(b: Any, count: Any, initial: list[Any], fill: float, body: Body) -> list[Any]:
    """body(load, store, carried) for every 16 of `count` elements; the last few pass through a padded buffer."""
    buffer = cgutils.alloca_once(b, VF32)
    place = b.ptrtoint(buffer, ir.IntType(64))
    loop = Loop(b, b.lshr(count, i64(4)), initial)
    offset = b.shl(loop.index, i64(6))
    values = body(
        lambda base: load(b, b.add(base, offset), VF32, 4),
        lambda base, v: store(b, b.add(base, offset), v, 4),
        list(loop.values),
    )
    values = list(loop.finish(values))
    rest, done = b.and_(count, i64(LANES - 1)), b.shl(b.lshr(count, i64(4)), i64(6))

    def load_rest(base: Any) -> Any:
        store(b, place, const(VF32, fill), 4)
        copy = Loop(b, rest, [])
        at = b.shl(copy.index, i64(2))
        store(b, b.add(place, at), load(b, b.add(b.add(base, done), at), F32, 4), 4)
        copy.finish([])
        return load(b, place, VF32, 4)

    def store_rest(base: Any, value: Any) -> None:
        store(b, place, value, 4)
        copy = Loop(b, rest, [])
        at = b.shl(copy.index, i64(2))
        store(b, b.add(b.add(base, done), at), load(b, b.add(place, at), F32, 4), 4)
        copy.finish([])

    before = b.block
    with b.if_then(b.icmp_signed("!=", rest, i64(0))):
        tail = body(load_rest, store_rest, values)
        inside = b.block
    merged = []
    for value, other in zip(values, tail, strict=True):
        phi = b.phi(value.type)
        phi.add_incoming(value, before)
        phi.add_incoming(other, inside)
        merged.append(phi)
    return merged


@intrinsic
def sum_of_squares(ctx, x, count):  # type: ignore
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, count = args

        def body(ld: Any, st: Any, acc: list[Any]) -> list[Any]:
            v = ld(x)
            return [fma(b, v, v, acc[0])]

        return tree(b, sweep(b, count, [const(VF32, 0.0)], 0.0, body)[0], b.fadd)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def sum_of(ctx, x, count):  # type: ignore
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, count = args
        total = sweep(b, count, [const(VF32, 0.0)], 0.0, lambda ld, st, acc: [b.fadd(acc[0], ld(x))])
        return tree(b, total[0], b.fadd)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def maximum(ctx, x, count):  # type: ignore
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, count = args
        low = const(VF32, float("-inf"))
        acc = sweep(b, count, [low], float("-inf"), lambda ld, st, acc: [larger(b, ld(x), acc[0])])
        return tree(b, acc[0], lambda p, q: larger(b, p, q))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def maximum_or_nan(ctx, x, count):  # type: ignore
    """The largest, or NaN where there is one."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, count = args
        low = const(VF32, float("-inf"))

        def pick(v: Any, most: Any, wrong: Any) -> list[Any]:
            return [larger(b, v, most), b.select(b.fcmp_unordered("uno", v, v), v, wrong)]

        most, wrong = sweep(b, count, [low, low], float("-inf"), lambda ld, st, acc: pick(ld(x), *acc))
        most = tree(b, most, lambda p, q: larger(b, p, q))
        wrong = tree(b, wrong, lambda p, q: b.select(b.fcmp_unordered("uno", p, p), p, q))
        return b.select(b.fcmp_unordered("uno", wrong, wrong), wrong, most)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def exp_sum(ctx, x, out, count, factor, shift):  # type: ignore
    """out = exp(factor * x + shift); returns the sum of out."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, out, count, factor, shift = args
        factor, shift = splat(b, factor), splat(b, shift)

        def body(ld: Any, st: Any, acc: list[Any]) -> list[Any]:
            y = exp(b, fma(b, ld(x), factor, shift))
            st(out, y)
            return [b.fadd(acc[0], y)]

        # the padding of the last vector must add nothing: exp(-inf) is 0 for any factor above zero
        return tree(b, sweep(b, count, [const(VF32, 0.0)], float("-inf"), body)[0], b.fadd)

    return types.float32(types.int64, types.int64, types.int64, types.float32, types.float32), codegen


@intrinsic
def silu_times(ctx, gate, up, out, count):  # type: ignore
    """out = gate / (1 + exp(-gate)) * up."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        gate, up, out, count = args

        def body(ld: Any, st: Any, acc: list[Any]) -> list[Any]:
            g = ld(gate)
            bottom = b.fadd(exp(b, b.fneg(g)), const(VF32, 1.0))
            st(out, b.fmul(b.fdiv(g, bottom), ld(up)))
            return acc

        sweep(b, count, [], 0.0, body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def group_sum(ctx, x, out, count, prescale):  # type: ignore
    """The sum of `count` (a multiple of 16) values, copied to out; with prescale 1 as x / 2^(4j), j = index mod 8 (7: 0)."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, out, count, prescale = args
        factors = b.select(
            b.icmp_signed("==", prescale, i64(1)), ir.Constant(VF32, PRESCALE), const(VF32, 1.0)
        )
        loop = Loop(b, b.lshr(count, i64(4)), [const(VF32, 0.0)])
        offset = b.shl(loop.index, i64(6))
        v = load(b, b.add(x, offset), VF32, 4)
        store(b, b.add(out, offset), b.fmul(v, factors), 4)
        (total,) = loop.finish([b.fadd(loop.values[0], v)])
        return tree(b, total, b.fadd)

    return types.float32(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def sigmoid(ctx, x, out, count):  # type: ignore
    """out = 1 / (1 + exp(-x))."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, out, count = args

        def body(ld: Any, st: Any, acc: list[Any]) -> list[Any]:
            bottom = b.fadd(exp(b, b.fneg(ld(x))), const(VF32, 1.0))
            st(out, b.fdiv(const(VF32, 1.0), bottom))
            return acc

        sweep(b, count, [], 0.0, body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def gelu_of(ctx, x, out, count):  # type: ignore
    """out = x / (1 + exp(-2u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3), which is x / 2 * (1 + tanh(u))."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, out, count = args

        def body(ld: Any, st: Any, acc: list[Any]) -> list[Any]:
            v = ld(x)
            cubic = fma(
                b, b.fmul(v, v), const(VF32, -2 * GELU_SLOPE * 0.044715), const(VF32, -2 * GELU_SLOPE)
            )
            bottom = b.fadd(exp(b, b.fmul(v, cubic)), const(VF32, 1.0))
            st(out, b.fdiv(v, bottom))
            return acc

        sweep(b, count, [], 0.0, body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
