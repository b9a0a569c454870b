"""How large the KV cache of a rank on a GPU may be: what is free once weights and workspace are there, as measured.

What the plan said beforehand is a prediction, shown beside the measured figures where memory is short. Sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from flm.kernels.staging import DeviceMemory

HOST_KV_BYTES = 1 << 30  # of a rank in the host's memory, where the configuration does not say


@dataclass(frozen=True)
class Planned:
    """What the plan expects of a rank; zeros where nothing was planned."""

    weights: int = 0
    kv: int = 0
    runtime: int = 0

    def __str__(self) -> str:
        if not self.weights:
            return "nothing was planned"
        return f"the plan said {mib(self.weights)} of weights, {mib(self.runtime)} of workspace and {mib(self.kv)} of KV cache"


NOTHING_PLANNED = Planned()


@dataclass(frozen=True)
class Held:
    """What a rank holds of its device, as measured: at its start, with weights, and with workspace too."""

    before: DeviceMemory
    loaded: DeviceMemory
    ready: DeviceMemory

    @property
    def weights(self) -> int:
        return self.before.free - self.loaded.free

    @property
    def workspace(self) -> int:
        return self.loaded.free - self.ready.free

    def __str__(self) -> str:
        return (
            f"{mib(self.ready.free)} of {mib(self.ready.total)} are free on {self.ready.name} beside {mib(self.weights)} of "
            f"weights and {mib(self.workspace)} of workspace"
        )


def kv_budget(held: Held, share: float) -> int:
    """Bytes for the cache, so that `share` of the device's memory is filled, whoever fills it."""
    return max(held.ready.free - int((1 - share) * held.ready.total), 0)


def shortage(wanted: int, held: Held, share: float, planned: Planned) -> str:
    """What is short, with all figures, where a cache of `wanted` bytes has no room; "" where it has."""
    budget = kv_budget(held, share)
    if wanted <= budget:
        return ""
    return (
        f"{mib(wanted)} of KV cache wanted, {mib(budget)} may be used: {held}, of which gpu_memory {share:g} leaves "
        f"{mib(int((1 - share) * held.ready.total))} unused; {planned}. Lower max_context or kv_cache.memory, quantise, use "
        "more GPUs (tensor_parallel), or end what else uses this one (nvidia-smi)"
    )


def mib(count: int) -> str:
    """People's words for a size."""
    return f"{count / 2**20:,.0f} MiB"
