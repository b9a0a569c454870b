"""Numba intrinsics on integer addresses: typed views, bit casts, atomics and the few C calls that waiting needs."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from flm.kernels.cpu.ir import F16, F32, I32, I64, call


def _pointer(kind: Any) -> Any:
    @intrinsic
    def cast(ctx, address):  # type: ignore
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return b.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), codegen

    return cast


_f32, _f64, _i32, _i64, _u64, _u32, _u8 = (
    _pointer(k)
    for k in (types.float32, types.float64, types.int32, types.int64, types.uint64, types.uint32, types.uint8)
)


@njit(inline="always")
def f32_at(address: int, count: int) -> Any:
    """float32 [count] at an address."""
    return carray(_f32(address), (count,))


@njit(inline="always")
def f64_at(address: int, count: int) -> Any:
    return carray(_f64(address), (count,))


@njit(inline="always")
def i32_at(address: int, count: int) -> Any:
    return carray(_i32(address), (count,))


@njit(inline="always")
def i64_at(address: int, count: int) -> Any:
    return carray(_i64(address), (count,))


@njit(inline="always")
def u64_at(address: int, count: int) -> Any:
    return carray(_u64(address), (count,))


@njit(inline="always")
def u32_at(address: int, count: int) -> Any:
    return carray(_u32(address), (count,))


@njit(inline="always")
def u8_at(address: int, count: int) -> Any:
    return carray(_u8(address), (count,))


@intrinsic
def float_of_bits(ctx, bits):  # type: ignore
    """float32 from the low 32 bits."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(b.trunc(args[0], I32), F32)

    return types.float32(types.int64), codegen


@intrinsic
def bits_of_float(ctx, value):  # type: ignore
    """The bits of a float32, as uint32."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(args[0], I32)

    return types.uint32(types.float32), codegen


@intrinsic
def load_half(ctx, address):  # type: ignore
    """A float16 as float32."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.fpext(b.load(b.inttoptr(args[0], ir.PointerType(F16)), align=2, typ=F16), F32)

    return types.float32(types.int64), codegen


@intrinsic
def store_half(ctx, address, value):  # type: ignore
    """A float32 as float16, round to nearest even."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.store(b.fptrunc(args[1], F16), b.inttoptr(args[0], ir.PointerType(F16)), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def fetch_add(ctx, address, value):  # type: ignore
    """Atomically add to an int64; the value before."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], ir.PointerType(I64)), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def load_acquire(ctx, address):  # type: ignore
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.load_atomic(b.inttoptr(args[0], ir.PointerType(I64)), "acquire", 8, typ=I64)

    return types.int64(types.int64), codegen


@intrinsic
def store_release(ctx, address, value):  # type: ignore
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.store_atomic(args[1], b.inttoptr(args[0], ir.PointerType(I64)), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def pause(ctx):  # type: ignore
    """Tell an x86 core that this is a waiting loop."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            call(b, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


sched_yield = types.ExternalFunction("sched_yield", types.int32())
usleep = types.ExternalFunction("usleep", types.int32(types.uint32))
clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.CPointer(types.int64)))


@njit
def fill(address: int, count: int, value: float) -> None:
    """Set `count` float32."""
    target = f32_at(address, count)
    for i in range(count):
        target[i] = value


@njit
def copy(source: int, target: int, count: int) -> None:
    """Copy `count` float32."""
    s, t = f32_at(source, count), f32_at(target, count)
    for i in range(count):
        t[i] = s[i]


SPINS, YIELDS, SLEEP_US = 500, 2_000, 50


@njit
def wait_a_little(rounds: int) -> int:
    """One round of a wait: spin for some 10 µs, then yield the core for some ms, then sleep. Returns rounds + 1.

    Threads and ranks may outnumber cores: who spins longer keeps the one he waits for from running."""
    if rounds < SPINS:
        pause()
    elif rounds < SPINS + YIELDS:
        sched_yield()
    else:
        usleep(np.uint32(SLEEP_US))
    return rounds + 1
