"""cuBLASLt through ctypes: products of 16-bit matrices with float32 sums, on a stream, with a workspace of our own.

Plain C calls, which need no other package and can be captured: CuPy refuses its own cuBLAS calls there. Names, numbers and
structures are those of cublasLt.h of CUDA 12 and 13. Shape legend: M rows of x, N outputs, K inputs.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import byref, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flm.kernels.errors import LibraryFailed, ToolkitMissing

TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType_t
FLOAT32_SUMS = 68  # CUBLAS_COMPUTE_32F
ADDED_AS_FLOAT32 = (
    2  # CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: parts of a cut K are not rounded before they are added
)
TRANSPOSED, AS_IT_IS = 1, 0  # cublasOperation_t
DESC_TRANS_A, DESC_TRANS_B = 3, 4  # cublasLtMatmulDescAttributes_t
LAYOUT_COLS = 3  # cublasLtMatrixLayoutAttribute_t
PREFER_WORKSPACE, PREFER_REDUCTION, PREFER_ALIGNMENT = 1, 3, (5, 6, 7, 8)  # of A, B, C, D
ALIGNMENT = 16  # bytes, of every matrix
NOT_SUPPORTED = 15  # cublasStatus_t
CANDIDATES = 8
FOLDERS = {13: "nvidia/cu13/lib", 12: "nvidia/cublas/lib"}  # of the wheels, below site-packages
PACKAGES = {13: "nvidia-cublas", 12: "nvidia-cublas-cu12"}


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t."""

    _fields_ = (("data", c_uint64 * 8),)


class Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", Algorithm),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@dataclass(frozen=True)
class Shape:
    """out[M, N] = x[M, K] @ weight[N, K].T, all in rows; out's begin `out_stride` elements apart."""

    N: int
    K: int
    out_stride: int
    activation: str
    out: str


@dataclass(frozen=True, eq=False)
class Product:
    """An algorithm for one shape and some numbers of rows, with the descriptors that it takes."""

    shape: Shape
    operation: c_void_p
    weight: c_void_p
    x: c_void_p
    out: c_void_p
    algorithm: Algorithm


def find_library(major: int) -> str | None:
    """The path of cuBLASLt of a CUDA major version: of NVIDIA's wheel, else of the system. None where there is none."""
    for entry in sys.path:
        found = sorted(Path(entry, FOLDERS.get(major, "")).glob(f"libcublasLt.so.{major}*"))
        if found and major in FOLDERS:
            return str(found[-1])
    name = f"libcublasLt.so.{major}"
    try:
        ctypes.CDLL(name)
    except OSError:
        return None
    return name


def require_library(major: int) -> str:
    """Its path. Raises ToolkitMissing."""
    path = find_library(major)
    if path is None:
        said = f"matmul: cublas needs libcublasLt.so.{major}, which was not found"
        raise ToolkitMissing(said, PACKAGES.get(major, "cuBLAS"), f"cublas{major}")
    return path


def load_library(major: int) -> Any:
    """cuBLASLt of a CUDA major version. Raises ToolkitMissing."""
    library = ctypes.CDLL(require_library(major))
    library.cublasLtGetStatusString.restype = c_char_p
    return library


class CublasLt:
    """One GPU's. `workspace`: bytes that products may take."""

    def __init__(self, library: Any, workspace: int) -> None:
        """Raises LibraryFailed where the library does not start on the current device."""
        self._library, self._workspace = library, workspace
        self._handle = c_void_p()
        self._call("Create", byref(self._handle))
        self._one, self._zero = c_float(1), c_float(0)

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._library, f"cublasLt{name}")(*args)
        if status:
            said = self._library.cublasLtGetStatusString(status)
            raise LibraryFailed(f"cublasLt{name}", status, said.decode())

    def _set(self, kind: str, descriptor: c_void_p, attribute: int, value: Any) -> None:
        self._call(f"{kind}SetAttribute", descriptor, attribute, byref(value), c_size_t(ctypes.sizeof(value)))

    def _layout(self, dtype: str, rows: int, cols: int, lead: int) -> c_void_p:
        """Of a matrix in columns, which is how cuBLAS takes them."""
        made = c_void_p()
        sizes = c_uint64(rows), c_uint64(cols), c_int64(lead)
        self._call("MatrixLayoutCreate", byref(made), TYPES[dtype], *sizes)
        return made

    def _operation(self) -> c_void_p:
        made = c_void_p()
        self._call("MatmulDescCreate", byref(made), FLOAT32_SUMS, TYPES["float32"])
        self._set("MatmulDesc", made, DESC_TRANS_A, c_int32(TRANSPOSED))
        self._set("MatmulDesc", made, DESC_TRANS_B, c_int32(AS_IT_IS))
        return made

    def _preference(self) -> c_void_p:
        made = c_void_p()
        self._call("MatmulPreferenceCreate", byref(made))
        self._set("MatmulPreference", made, PREFER_WORKSPACE, c_uint64(self._workspace))
        self._set("MatmulPreference", made, PREFER_REDUCTION, c_uint32(ADDED_AS_FLOAT32))
        for attribute in PREFER_ALIGNMENT:
            self._set("MatmulPreference", made, attribute, c_uint32(ALIGNMENT))
        return made

    def choose(self, shape: Shape, low: int, high: int) -> Product | None:
        """What the library thinks best for `high` rows of x and can also take for `low`; None where it knows nothing.

        In columns, matrices in rows are their transposes: out.T[N, M] = weight.T[K, N].T @ x.T[K, M].
        """
        weight = self._layout(shape.activation, shape.K, shape.N, shape.K)
        x = self._layout(shape.activation, shape.K, high, shape.K)
        out = self._layout(shape.out, shape.N, high, shape.out_stride)
        operation, preference = self._operation(), self._preference()
        results, count = (Found * CANDIDATES)(), c_int()
        described = operation, weight, x, out, out
        asked = (preference, CANDIDATES, results, byref(count))
        try:
            self._call("MatmulAlgoGetHeuristic", self._handle, *described, *asked)
        except LibraryFailed as error:
            if error.status != NOT_SUPPORTED:
                raise
            count.value = 0
        finally:
            self._library.cublasLtMatmulPreferenceDestroy(preference)
        self._set_rows(x, out, low)
        check, checked = self._library.cublasLtMatmulAlgoCheck, Found()
        for found in results[: count.value]:
            if found.state or check(self._handle, *described, byref(found.algorithm), byref(checked)):
                continue
            if max(found.workspace, checked.workspace) <= self._workspace:
                return Product(shape, operation, weight, x, out, found.algorithm)
        return None

    def _set_rows(self, x: c_void_p, out: c_void_p, rows: int) -> None:
        for layout in (x, out):
            self._set("MatrixLayout", layout, LAYOUT_COLS, c_uint64(rows))

    def multiply(
        self,
        product: Product,
        rows: int,
        places: tuple[int, int, int],
        add: bool,
        workspace: int,
        stream: int,
    ) -> None:
        """out = x @ weight.T, or out += that where `add`, on a stream. places: addresses of weight, x and out."""
        self._set_rows(product.x, product.out, rows)
        weight, x, out = (c_void_p(place) for place in places)
        self._call(
            "Matmul", self._handle, product.operation, byref(self._one),
            weight, product.weight, x, product.x,
            byref(self._one if add else self._zero), out, product.out, out, product.out,
            byref(product.algorithm), c_void_p(workspace), c_size_t(self._workspace), c_void_p(stream),
        )  # fmt: skip
