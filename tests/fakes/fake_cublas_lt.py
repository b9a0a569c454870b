"""cuBLASLt's C calls on host memory: NumPy does what the descriptors say. Attributes, sizes and combinations that are not
written down here are refused, as the library refuses what it does not know; numbers are those of cublasLt.h."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from flm.kernels.cuda.cublas_lt import Found

DTYPES = {0: np.dtype(np.float32), 2: np.dtype(np.float16), 14: np.dtype(ml_dtypes.bfloat16)}
OK, NOT_INITIALIZED, INVALID, EXECUTION_FAILED, NOT_SUPPORTED = 0, 1, 7, 13, 15
# attribute -> bytes of its value, and what it is before it is set
DESC = {3: (4, 0), 4: (4, 0)}
LAYOUT = {3: (8, 0)}
PREFERENCE = {1: (8, 0), 3: (4, 7), 5: (4, 256), 6: (4, 256), 7: (4, 256), 8: (4, 256)}
REDUCES_AS_FLOAT32, NEEDS = 2, 1 << 20  # what the algorithms do with parts of K, and their workspace


@dataclass
class Object:
    """What a handle stands for."""

    kind: str
    values: dict[int, int] = field(default_factory=dict)
    known: dict[int, tuple[int, int]] = field(default_factory=dict)
    facts: tuple[int, ...] = ()

    def get(self, attribute: int) -> int:
        return self.values.get(attribute, self.known[attribute][1])


def _target(reference: Any) -> Any:
    """What a byref(...) leads to."""
    return reference._obj


class FakeCublasLt:
    """`streams`: of all products that were made; `chosen`: how often an algorithm was asked for. `fails`: the status that
    products end with; `knows`: whether it has algorithms."""

    def __init__(self) -> None:
        self._objects: dict[int, Object] = {}
        self.streams: list[int] = []
        self.chosen = 0
        self.fails, self.knows, self.starts = OK, True, True

    def cublasLtGetStatusString(self, status: int) -> bytes:
        return f"status {status} of a fake".encode()

    def _new(self, out: Any, made: Object) -> int:
        number = 1000 + len(self._objects)
        self._objects[number] = made
        _target(out).value = number
        return OK

    def _of(self, handle: Any, kind: str) -> Object:
        found = self._objects[handle.value]
        assert found.kind == kind, f"a {kind} expected, got a {found.kind}"
        return found

    def _set(self, handle: Any, kind: str, attribute: int, value: Any, size: Any) -> int:
        found = self._of(handle, kind)
        if attribute not in found.known or found.known[attribute][0] != size.value:
            return INVALID
        assert ctypes.sizeof(_target(value)) == size.value
        found.values[attribute] = int(_target(value).value)
        return OK

    def cublasLtCreate(self, out: Any) -> int:
        return self._new(out, Object("handle")) if self.starts else NOT_INITIALIZED

    def cublasLtMatmulDescCreate(self, out: Any, compute: int, scale: int) -> int:
        return self._new(out, Object("operation", known=DESC)) if (compute, scale) == (68, 0) else INVALID

    def cublasLtMatmulDescSetAttribute(self, handle: Any, attribute: int, value: Any, size: Any) -> int:
        return self._set(handle, "operation", attribute, value, size)

    def cublasLtMatrixLayoutCreate(self, out: Any, dtype: int, rows: Any, cols: Any, lead: Any) -> int:
        sizes = [(rows, ctypes.c_uint64), (cols, ctypes.c_uint64), (lead, ctypes.c_int64)]
        assert all(type(value) is kind for value, kind in sizes), "64-bit sizes expected"
        if dtype not in DTYPES or lead.value < rows.value:
            return INVALID
        facts = dtype, rows.value, lead.value
        return self._new(out, Object("layout", {3: cols.value}, LAYOUT, facts))

    def cublasLtMatrixLayoutSetAttribute(self, handle: Any, attribute: int, value: Any, size: Any) -> int:
        return self._set(handle, "layout", attribute, value, size)

    def cublasLtMatmulPreferenceCreate(self, out: Any) -> int:
        return self._new(out, Object("preference", known=PREFERENCE))

    def cublasLtMatmulPreferenceSetAttribute(self, handle: Any, attribute: int, value: Any, size: Any) -> int:
        return self._set(handle, "preference", attribute, value, size)

    def cublasLtMatmulPreferenceDestroy(self, handle: Any) -> int:
        self._of(handle, "preference")
        return OK

    def cublasLtMatmulAlgoGetHeuristic(
        self, handle: Any, operation: Any, a: Any, b: Any, c: Any, d: Any,
        preference: Any, asked: int, results: Any, count: Any,
    ) -> int:  # fmt: skip
        """Two: the first for these sizes alone and a reduction that is exact, the second for fewer columns too."""
        self._of(handle, "handle")
        self.chosen += 1
        facts, wishes = self._facts(operation, a, b, c, d), self._of(preference, "preference")
        if facts is None:
            return INVALID
        if not self.knows:
            return NOT_SUPPORTED
        mask, aligned = wishes.get(3), min(wishes.get(n) for n in (5, 6, 7, 8))
        assert asked >= 3 and len(results) == asked
        for number in range(3):
            found = results[number]
            found.state = INVALID if number == 0 else OK
            found.workspace = NEEDS
            found.algorithm.data[:5] = (number, mask, aligned, hash(facts) & 0xFFFFFFFF, self._cols(d))
        _target(count).value = 3 if wishes.get(1) >= NEEDS else 0
        return OK

    def cublasLtMatmulAlgoCheck(
        self, handle: Any, operation: Any, a: Any, b: Any, c: Any, d: Any, algorithm: Any, result: Any
    ) -> int:
        number, _, _, key, most = _target(algorithm).data[:5]
        facts = self._facts(operation, a, b, c, d)
        if facts is None or hash(facts) & 0xFFFFFFFF != key:
            return INVALID
        fewer = self._cols(d) < most
        if self._cols(d) > most or number == 0 or (number == 1 and fewer):
            return NOT_SUPPORTED
        _target(result).workspace = NEEDS
        return OK

    def _cols(self, layout: Any) -> int:
        return self._of(layout, "layout").get(3)

    def _facts(self, operation: Any, a: Any, b: Any, c: Any, d: Any) -> tuple[int, ...] | None:
        """What an algorithm is chosen by, beside the columns of B and D; None where the matrices do not fit."""
        trans = tuple(self._of(operation, "operation").get(n) for n in (3, 4))
        layouts = [self._of(each, "layout") for each in (a, b, c, d)]
        (am, ak), (bk, bn) = (
            (rows, cols) if not turned else (cols, rows)
            for turned, (rows, cols) in zip(trans, [(x.facts[1], x.get(3)) for x in layouts[:2]], strict=True)
        )  # fmt: skip
        sizes = [(x.facts[1], x.get(3)) for x in layouts[2:]]
        kinds = [x.facts[0] for x in layouts]
        known = kinds[0] == kinds[1] != 0 and kinds[2] == kinds[3] in (0, kinds[0])
        if ak != bk or sizes != [(am, bn)] * 2 or not known:
            return None
        return (*trans, am, ak, *kinds, *(x.facts[2] for x in layouts))

    def _view(self, place: Any, layout: Any, alignment: int) -> Any:
        """A matrix in columns, at an address."""
        dtype, rows, lead = self._of(layout, "layout").facts
        kind, cols = DTYPES[dtype], self._cols(layout)
        assert place.value % alignment == 0 and lead * kind.itemsize % alignment == 0, "alignment"
        nbytes = ((cols - 1) * lead + rows) * kind.itemsize
        flat = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(place.value)).view(kind)
        return np.lib.stride_tricks.as_strided(flat, (rows, cols), (kind.itemsize, lead * kind.itemsize))

    def cublasLtMatmul(
        self, handle: Any, operation: Any, alpha: Any, a: Any, a_layout: Any, b: Any, b_layout: Any, beta: Any,
        c: Any, c_layout: Any, d: Any, d_layout: Any, algorithm: Any, workspace: Any, size: Any, stream: Any,
    ) -> int:  # fmt: skip
        if self.fails:
            return self.fails
        layouts = operation, a_layout, b_layout, c_layout, d_layout
        status = self.cublasLtMatmulAlgoCheck(handle, *layouts, algorithm, ctypes.byref(Found()))
        if status or size.value < NEEDS:
            return status or INVALID
        ctypes.memset(workspace.value, 0xFF, NEEDS)
        _, mask, alignment, *_ = _target(algorithm).data
        A, B, C, D = (
            self._view(place, layout, alignment)
            for place, layout in zip((a, b, c, d), layouts[1:], strict=True)
        )
        turned = self._of(operation, "operation")
        A = (A.T if turned.get(3) else A).astype(np.float64)
        B = (B.T if turned.get(4) else B).astype(np.float64)
        half = A.shape[1] // 2
        parts = A[:, :half] @ B[:half], A[:, half:] @ B[half:]
        if mask != REDUCES_AS_FLOAT32:  # then parts may be rounded as the result is
            parts = tuple(part.astype(D.dtype).astype(np.float64) for part in parts)
        scale, keep = _target(alpha).value, _target(beta).value
        total = scale * (parts[0] + parts[1]) + (keep * C.astype(np.float64) if keep else 0)
        D[...] = total.astype(D.dtype)
        self.streams.append(stream.value or 0)
        return OK
