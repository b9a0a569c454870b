"""The backend of a device's name."""

from __future__ import annotations

from typing import Any, cast

from flm.kernels.backend import Backend
from flm.worker.errors import ConfigError


def open_backend(device: str, threads: int, activations: str = "auto", matmul: str = "exact") -> Backend:
    """The backend of a device name. "reference" is the slow NumPy specification of every op. activations, matmul: of GPUs.

    Casts, because a backend takes back only weights and caches of its own making, which the protocol cannot say.
    """
    on_gpu = device == "cuda"
    for field, value, choices in (
        ("activations", activations, ("auto", "bfloat16", "float16") if on_gpu else ("auto",)),
        ("matmul", matmul, ("exact", "cublas") if on_gpu else ("exact",)),
    ):
        if value not in choices:
            raise ConfigError(f"expected {' or '.join(choices)} on {device}, got {value!r}", field=field)
    if device == "cpu":
        from flm.kernels.cpu.backend import CpuBackend

        return cast(Backend, CpuBackend(threads=threads))
    if device == "cuda":
        return cast(Backend, _open_gpu("float16" if activations == "float16" else "bfloat16", matmul))
    if device == "reference":
        from flm.kernels.reference import ReferenceBackend

        return cast(Backend, ReferenceBackend())
    raise ConfigError(f"expected cpu or cuda, got {device!r}", field="device")


def _open_gpu(activation: str, matmul: str) -> Any:
    from flm.kernels.cuda.backend import CudaBackend
    from flm.kernels.cuda.device import CupyDevice
    from flm.kernels.cuda.library_products import open_library

    device = CupyDevice()
    return CudaBackend(device, activation, open_library(device, device.cuda) if matmul == "cublas" else None)
