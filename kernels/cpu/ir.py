"""Small vocabulary for writing LLVM vector code inside numba intrinsics.

All vectors have LANES = 16 elements whatever the machine: LLVM splits them into what the CPU has (two AVX2 registers, one
AVX-512 register, four NEON registers). So sums over lanes come out the same, bit for bit, on every machine.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

LANES = 16
F32, F16, I8, I16, I32, I64 = (
    ir.FloatType(),
    ir.HalfType(),
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
)
VF32, VF16 = ir.VectorType(F32, LANES), ir.VectorType(F16, LANES)
VI8, VI16, VI32 = ir.VectorType(I8, LANES), ir.VectorType(I16, LANES), ir.VectorType(I32, LANES)
Value = Any
Builder = Any


def const(kind: ir.Type, value: float) -> ir.Constant:
    """A scalar constant, or a vector with the same constant in all lanes."""
    return ir.Constant(kind, [value] * LANES if isinstance(kind, ir.VectorType) else value)


def i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def load(b: Builder, address: Value, kind: ir.Type, align: int = 1) -> Value:
    """Load a value of any type from an integer address."""
    return b.load(b.inttoptr(address, ir.PointerType(kind)), align=align, typ=kind)


def store(b: Builder, address: Value, value: Value, align: int = 1) -> None:
    b.store(value, b.inttoptr(address, ir.PointerType(value.type)), align=align)


def opaque(b: Builder, value: Value) -> Value:
    """The same int64, of which LLVM no longer knows where it came from: what is loaded through it is loaded again rather
    than kept in registers that a loop has not got."""
    kind = ir.FunctionType(I64, [I64])
    return b.asm(kind, "", "=r,0", [value], side_effect=False)


def splat(b: Builder, scalar: Value) -> Value:
    """The scalar in all lanes."""
    kind = ir.VectorType(scalar.type, LANES)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), const(VI32, 0))


def call(b: Builder, name: str, kind: ir.Type, *args: Value) -> Value:
    """Call an LLVM intrinsic, such as llvm.fma.v16f32."""
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(kind, [a.type for a in args]), name)
    return b.call(function, args)


def fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z with one rounding."""
    return call(b, "llvm.fma.v16f32", VF32, x, y, z)


def prefetch(b: Builder, address: Value) -> None:
    """Start to bring the cache line of an address, which need not be valid, into the first-level cache."""
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(I8), I32, I32, I32])
    function = b.module.globals.get("llvm.prefetch.p0") or ir.Function(b.module, kind, "llvm.prefetch.p0")
    read, keep, data = (ir.Constant(I32, n) for n in (0, 3, 1))
    b.call(function, [b.inttoptr(address, ir.PointerType(I8)), read, keep, data])


def load_f32(b: Builder, address: Value, form: str) -> Value:
    """16 values stored as float32, float16, bfloat16, fp8 or int8, as float32; fp8 divided by 256.

    fp8 (e4m3) in half precision's place for sign, exponent and mantissa is the value over 2^8, denormal numbers included.
    """
    if form == "float32":
        return load(b, address, VF32, 4)
    if form == "float16":
        return b.fpext(load(b, address, VF16, 2), VF32)
    if form == "bfloat16":
        return b.bitcast(b.shl(b.zext(load(b, address, VI16, 2), VI32), const(VI32, 16)), VF32)
    if form == "fp8":
        bits = b.zext(load(b, address, VI8), VI16)
        size, sign = b.and_(bits, const(VI16, 127)), b.and_(bits, const(VI16, 128))
        half = b.or_(b.shl(size, const(VI16, 7)), b.shl(sign, const(VI16, 8)))
        return b.fpext(b.bitcast(half, VF16), VF32)
    return b.sitofp(b.sext(load(b, address, VI8), VI32), VF32)


class Loop:
    """A counted loop whose carried values stay in registers: `for i in range(count): values = body(i, values)`."""

    def __init__(self, b: Builder, count: Value, initial: list[Value]) -> None:
        self.b, self.count = b, count
        self.before = b.block
        self.head, self.body, self.end = (b.append_basic_block(n) for n in ("head", "body", "end"))
        b.branch(self.head)
        b.position_at_end(self.head)
        self.index = b.phi(I64)
        self.index.add_incoming(i64(0), self.before)
        self.values = [b.phi(v.type) for v in initial]
        for phi, value in zip(self.values, initial, strict=True):
            phi.add_incoming(value, self.before)
        b.cbranch(b.icmp_signed("<", self.index, count), self.body, self.end)
        b.position_at_end(self.body)

    def finish(self, values: list[Value]) -> list[Value]:
        """Close the body with the values for the next round; code goes on after the loop."""
        b = self.b
        self.index.add_incoming(b.add(self.index, i64(1)), b.block)
        for phi, value in zip(self.values, values, strict=True):
            phi.add_incoming(value, b.block)
        b.branch(self.head)
        b.position_at_end(self.end)
        return self.values
