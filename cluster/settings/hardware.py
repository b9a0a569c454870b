"""What machines a plan is made for: named in the YAML's `hardware:` section, or measured on this one.

Bandwidths are bytes/s of memory, memory sizes bytes. Figures of known GPUs are their makers' data sheets'.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from flm.cluster.settings.units import Bytes
from flm.kernels.cores import usable_cpus
from flm.kernels.cuda.inventory import visible_gpus, why_none


@dataclass(frozen=True)
class Gpu:
    """One accelerator: its memory (bytes) and that memory's bandwidth (bytes/s)."""

    kind: str
    memory: int
    bandwidth: float


KNOWN_GPUS = {
    gpu.kind: gpu
    for gpu in (
        Gpu("h200", 141 * 10**9, 4.8e12),
        Gpu("h100", 80 * 10**9, 3.35e12),
        Gpu("h20", 96 * 10**9, 4.0e12),
        Gpu("a100-80g", 80 * 10**9, 2.039e12),
        Gpu("a100-40g", 40 * 10**9, 1.555e12),
        Gpu("b200", 180 * 10**9, 8.0e12),
        Gpu("l40s", 48 * 10**9, 0.864e12),
        Gpu("l4", 24 * 10**9, 0.3e12),
        Gpu("a10", 24 * 10**9, 0.6e12),
        Gpu("rtx4090", 24 * 10**9, 1.008e12),
    )
}


@dataclass(frozen=True)
class Machine:
    """One machine. `memory` is what ranks on its CPUs may use; bandwidth 0 means unknown."""

    name: str
    cpus: int
    memory: int
    memory_bandwidth: float = 0.0
    gpus: int = 0
    gpu: Gpu | None = None


@dataclass(frozen=True)
class Hardware:
    """The machines of a cluster; `measured` where this one was looked at rather than named."""

    nodes: tuple[Machine, ...]
    measured: bool = False
    no_gpus: str = ""  # why this machine has none that can be used


class GpuSpec(BaseModel):
    """A GPU that is not in the table of known ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str = "gpu"
    memory: Bytes
    bandwidth: Bytes  # bytes/s


class NodeSpec(BaseModel):
    """One entry of the YAML's `hardware:` list: `count` machines alike."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    count: int = Field(default=1, ge=1)
    cpus: int = Field(ge=1)
    memory: Bytes
    memory_bandwidth: Bytes = 0  # bytes/s, for ranks on CPUs
    gpus: int = Field(default=0, ge=0)
    gpu: str | GpuSpec | None = None

    @field_validator("gpu")
    @classmethod
    def _known(cls, value: str | GpuSpec | None) -> str | GpuSpec | None:
        if isinstance(value, str) and value.lower() not in KNOWN_GPUS:
            kinds = ", ".join(KNOWN_GPUS)
            raise ValueError(f"expected one of {kinds}, or its memory and bandwidth; got {value!r}")
        return value

    @model_validator(mode="after")
    def _gpus_have_a_kind(self) -> NodeSpec:
        if self.gpus and self.gpu is None:
            raise ValueError("gpus without gpu: expected the kind of GPU, such as gpu: h100")
        return self

    def nodes(self) -> list[Machine]:
        """The machines this entry stands for; numbered where there are several."""
        gpu = KNOWN_GPUS[self.gpu.lower()] if isinstance(self.gpu, str) else None
        if isinstance(self.gpu, GpuSpec):
            gpu = Gpu(self.gpu.kind, self.gpu.memory, float(self.gpu.bandwidth))
        names = [self.name] if self.count == 1 else [f"{self.name}-{i}" for i in range(self.count)]
        rate = float(self.memory_bandwidth)
        return [Machine(name, self.cpus, self.memory, rate, self.gpus, gpu) for name in names]


def named_hardware(specs: list[NodeSpec]) -> Hardware:
    return Hardware(tuple(node for spec in specs for node in spec.nodes()))


def measure_hardware() -> Hardware:
    """This machine: usable cores, memory available now, copy bandwidth (a moment of copying), and its GPUs of the first
    one's kind."""
    cpus = usable_cpus()
    gpus = visible_gpus()
    alike = [gpu for gpu in gpus if gpu == gpus[0]]
    gpu = Gpu(alike[0].name, alike[0].memory, alike[0].bandwidth) if alike else None
    memory, bandwidth = psutil.virtual_memory().available, _copy_bandwidth(min(cpus, 16))
    node = Machine("localhost", cpus, memory, bandwidth, len(alike), gpu)
    return Hardware((node,), measured=True, no_gpus="" if alike else why_none())


def known_gpu(kind: str) -> Gpu | None:
    """The table's GPU of Ray's name for it (H100, A100-80G), where it has one."""
    return KNOWN_GPUS.get(kind.lower())


def _copy_bandwidth(threads: int) -> float:
    """Bytes/s read plus written by the fastest of a few large copies, one thread per core."""
    sources = [np.ones(48 << 20, np.uint8) for _ in range(threads)]
    targets = [np.empty_like(source) for source in sources]
    fastest = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(4):
            start = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))  # NumPy copies without the interpreter lock
            fastest = min(fastest, time.perf_counter() - start)
    return 2 * threads * sources[0].nbytes / fastest
