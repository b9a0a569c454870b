"""Register-blocked products: T tokens times R * 16 outputs, accumulators in registers, written as LLVM vector code.

Two forms, each a numba intrinsic on integer addresses, whose first argument (the weight form) is a compile-time constant:

affine  quantisation groups: per group acc = fma over k of code * x, from zero; then
        out = fma(scale, acc, fma(offset, xsum, out)) per output. Exactly this order for every T.
plain   float weights: out = fma over k of w * x, from out.

int4 codes come as 32-bit words that hold 8 successive k of one output; a nibble is masked where it stands and converted
as code * 2^(4j), and x arrives divided by 2^(4j) (exact), which saves the shift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from numba import types
from numba.extending import intrinsic

from flm.kernels.cpu.ir import (
    F32,
    LANES,
    VF32,
    VI32,
    Loop,
    const,
    fma,
    i64,
    load,
    load_f32,
    opaque,
    prefetch,
    splat,
    store,
)

PANEL = 64  # outputs per panel of packed weights
MAX_TOKENS = 6
PREFETCH_TOKENS = (
    2  # up to this many tokens memory is the limit; the hardware's own prefetching stops at page ends
)
PREFETCH_BYTES = 4096
PREFETCH_SCALES = 1024
INT4, INT8, FLOAT32, FLOAT16, BFLOAT16, FLOAT8 = range(6)
WIDTH = (4, 1, 4, 2, 2, 1)  # bytes an output takes in one row of codes (a row is 8 k for int4)
STEPS = (8, 4, 1, 1, 1, 4)  # k per round of the inner loop
NAMES = ("int4", "int8", "float32", "float16", "bfloat16", "fp8")


def _weights(b: Any, form: int, address: Any, r: int, j: int) -> Any:
    """16 weights (for int4: times 2^(4j)) of output vector r at step j of the round that starts at `address`."""
    if form != INT4:
        return load_f32(b, b.add(address, i64(r * LANES * WIDTH[form])), NAMES[form])
    word = load(b, b.add(address, i64(r * LANES * 4)), VI32, 4)
    if j == 7:
        return b.sitofp(b.lshr(word, const(VI32, 28)), VF32)
    return b.sitofp(b.and_(word, const(VI32, 15 << (4 * j))), VF32)


def _inner(
    b: Any, form: int, T: int, R: int, w: Any, w_stride: Any, x: Any, x_stride: Any, k: Any, acc: list[Any]
) -> list[Any]:
    """The loop over k; acc[t * R + r]. w_stride: bytes per row of codes."""
    steps = STEPS[form]
    rounds = b.udiv(k, i64(steps)) if steps > 1 else k
    rows = [b.add(x, b.mul(x_stride, i64(t))) for t in range(T)]
    loop = Loop(b, rounds, acc)
    acc = list(loop.values)
    at = b.mul(loop.index, i64(steps))
    again = None
    for j in range(steps):
        row = loop.index if form == INT4 else b.add(at, i64(j))
        address = b.add(w, b.mul(row, w_stride))
        if form == INT4 and T == 1:
            again = address = opaque(
                b, again or address
            )  # each k reads the codes anew: sums need the registers
        x_at = b.shl(b.add(at, i64(j)), i64(2))
        xs = [splat(b, load(b, b.add(rows[t], x_at), F32, 4)) for t in range(T)]
        if T <= PREFETCH_TOKENS and (form != INT4 or j == 0):
            for line in range(0, R * LANES * WIDTH[form], 64):
                prefetch(b, b.add(address, i64(PREFETCH_BYTES + line)))
        for r in range(R):
            weight = _weights(b, form, address, r, j)
            for t in range(T):
                acc[t * R + r] = fma(b, weight, xs[t], acc[t * R + r])
    return loop.finish(acc)


def _places(b: Any, T: int, R: int, out: Any, out_stride: Any) -> list[Any]:
    return [
        b.add(b.add(out, b.mul(out_stride, i64(t))), i64(r * LANES * 4)) for t in range(T) for r in range(R)
    ]


def _affine_body(b: Any, form: int, T: int, R: int, lane: Any, args: dict[str, Any]) -> None:
    """One group for R * 16 outputs from `lane`."""
    w = b.add(args["w"], b.mul(lane, i64(WIDTH[form])))
    zeros = [const(VF32, 0.0)] * (T * R)
    acc = _inner(
        b, form, T, R, w, i64(PANEL * WIDTH[form]), args["x"], b.shl(args["k"], i64(2)), args["k"], zeros
    )
    places = _places(b, T, R, b.add(args["out"], b.shl(lane, i64(2))), i64(PANEL * 4))
    is_half = b.icmp_signed("!=", args["half"], i64(0))
    scale_at = b.mul(lane, b.select(is_half, i64(2), i64(4)))
    if T <= PREFETCH_TOKENS:
        for table in ("scales", "offsets"):
            for line in range(0, R * LANES * 2, 64):
                prefetch(b, b.add(b.add(args[table], scale_at), i64(PREFETCH_SCALES + line)))
    at = {table: b.add(args[table], scale_at) for table in ("scales", "offsets")}
    xsum = [b.add(args["xsum"], i64(4 * t)) for t in range(T)]
    for kind in _alternatives(b, is_half, ("float16", "float32")):
        for has_offsets in _alternatives(b, b.icmp_signed("!=", args["offsets"], i64(0)), (True, False)):
            _add_group(b, T, R, acc, places, kind, at["scales"], at["offsets"] if has_offsets else None, xsum)


def _alternatives(b: Any, condition: Any, values: tuple[Any, Any]) -> Iterator[Any]:
    """Both values in turn, with the builder in the branch where that one holds: decided once, outside of what follows."""
    with b.if_else(condition) as (then, otherwise):
        with then:
            yield values[0]
        with otherwise:
            yield values[1]


def _add_group(
    b: Any,
    T: int,
    R: int,
    acc: list[Any],
    places: list[Any],
    kind: str,
    scales: Any,
    offsets: Any | None,
    xsum: list[Any],
) -> None:
    """out = fma(scale, acc, fma(offset, xsum, out)) for R * 16 outputs and T tokens; scales and offsets are of `kind`."""
    width = 2 if kind == "float16" else 4
    sums = [] if offsets is None else [splat(b, load(b, place, F32, 4)) for place in xsum]
    for r in range(R):
        scale = load_f32(b, b.add(scales, i64(r * LANES * width)), kind)
        offset = None if offsets is None else load_f32(b, b.add(offsets, i64(r * LANES * width)), kind)
        for t in range(T):
            place = places[t * R + r]
            value = load(b, place, VF32, 4)
            if offset is not None:
                value = fma(b, offset, sums[t], value)
            store(b, place, fma(b, scale, acc[t * R + r], value), 4)


def _plain_body(b: Any, form: int, T: int, R: int, lane: Any, args: dict[str, Any]) -> None:
    """All k for R * 16 outputs from `lane`."""
    w = b.add(args["w"], b.mul(lane, i64(WIDTH[form])))
    places = _places(b, T, R, b.add(args["out"], b.shl(lane, i64(2))), args["out_stride"])
    initial = [load(b, p, VF32, 4) for p in places]
    acc = _inner(b, form, T, R, w, args["w_stride"], args["x"], args["x_stride"], args["k"], initial)
    for place, value in zip(places, acc, strict=True):
        store(b, place, value, 4)


def _over_lanes(b: Any, lane: Any, lanes: Any, R: int, body: Callable[[Any], None]) -> tuple[Any, Any]:
    """Run the body for every whole R * 16 lanes; what is left is returned."""
    size = R * LANES
    loop = Loop(b, b.udiv(lanes, i64(size)), [])
    body(b.add(lane, b.mul(loop.index, i64(size))))
    loop.finish([])
    done = b.mul(b.udiv(lanes, i64(size)), i64(size))
    return b.add(lane, done), b.sub(lanes, done)


def _switch(b: Any, tokens: Any, lane: Any, lanes: Any, body: Callable[[int, int, Any], None]) -> None:
    """body(T, R, lane) over the lanes, for the run-time number of tokens, 1 to MAX_TOKENS."""
    end = b.append_basic_block("tokens_done")
    switch = b.switch(tokens, end)
    for T in range(1, MAX_TOKENS + 1):
        block = b.append_basic_block(f"tokens_{T}")
        switch.add_case(i64(T), block)
        b.position_at_end(block)
        at, left = lane, lanes
        for R in {1: (4, 2, 1), 2: (2, 1)}.get(T, (1,)):
            at, left = _over_lanes(b, at, left, R, lambda lane, T=T, R=R: body(T, R, lane))  # type: ignore[misc]
        b.branch(end)
    b.position_at_end(end)


@intrinsic(prefer_literal=True)
def affine(  # type: ignore
    ctx, form, T, lane, lanes, w, w_group, x, x_group, k, G, out, scales, offsets, half, xsum, xsum_group
):
    """G groups of k inputs for T <= 6 tokens; out [T, 64]. x [G, T, k] and xsum [G, T] lie together by groups, so that a
    group's x takes few cache lines: *_group are bytes from one group to the next. scales, offsets [G, 64], float16 where
    half, offsets 0 for none."""
    names = (
        "w",
        "w_group",
        "x",
        "x_group",
        "k",
        "G",
        "out",
        "scales",
        "offsets",
        "half",
        "xsum",
        "xsum_group",
    )
    kind = form.literal_value

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        _, T, lane, lanes, *rest = values
        a = dict(zip(names, rest, strict=True))
        has_offsets = b.icmp_signed("!=", a["offsets"], i64(0))
        scale_bytes = b.select(b.icmp_signed("!=", a["half"], i64(0)), i64(PANEL * 2), i64(PANEL * 4))
        loop = Loop(b, a["G"], [])
        g = loop.index
        here = dict(a)
        here["w"] = b.add(a["w"], b.mul(g, a["w_group"]))
        here["x"] = b.add(a["x"], b.mul(g, a["x_group"]))
        here["xsum"] = b.add(a["xsum"], b.mul(g, a["xsum_group"]))
        here["scales"] = b.add(a["scales"], b.mul(g, scale_bytes))
        here["offsets"] = b.select(has_offsets, b.add(a["offsets"], b.mul(g, scale_bytes)), i64(0))
        _switch(b, T, lane, lanes, lambda T, R, lane: _affine_body(b, kind, T, R, lane, here))
        loop.finish([])
        return context.get_dummy_value()

    return types.void(form, *[types.int64] * 15), codegen


@intrinsic(prefer_literal=True)
def plain(ctx, form, T, lanes, w, w_stride, x, x_stride, k, out, out_stride):  # type: ignore
    """out [T <= 6, lanes] += x [T, k] @ w [k, lanes]; strides in bytes, lanes a multiple of 16."""
    names = ("w", "w_stride", "x", "x_stride", "k", "out", "out_stride")
    kind = form.literal_value

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        _, T, lanes, *rest = values
        args = dict(zip(names, rest, strict=True))
        _switch(b, T, i64(0), lanes, lambda T, R, lane: _plain_body(b, kind, T, R, lane, args))
        return context.get_dummy_value()

    return types.void(form, *[types.int64] * 9), codegen


@intrinsic(prefer_literal=True)
def convert(ctx, form, codes, tile, k):  # type: ignore
    """A group's codes [k, 64] to float32 [k, 64], int4 times 2^(4j) as everywhere."""
    kind = form.literal_value

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _, codes, tile, k = args
        steps = STEPS[kind]
        loop = Loop(b, b.udiv(k, i64(steps)), [])
        source = b.add(codes, b.mul(loop.index, i64(PANEL * 4)))
        target = b.add(tile, b.mul(loop.index, i64(steps * PANEL * 4)))
        for r in range(PANEL // LANES):
            for j in range(steps):
                row = source if kind == INT4 else b.add(source, i64(j * PANEL))
                place = b.add(target, i64((j * PANEL + r * LANES) * 4))
                store(b, place, _weights(b, kind, row, r, j), 4)
        loop.finish([])
        return context.get_dummy_value()

    return types.void(form, types.int64, types.int64, types.int64), codegen
