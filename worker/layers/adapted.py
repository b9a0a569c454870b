"""What adapters add to one product of a layer (LoRA, arXiv:2106.09685).

Ranks that share a matrix by rows all work out the whole of down @ x and expand it to their rows; ranks that share it by
columns have some columns of `down` each, and what they add is summed over ranks with the product itself.

Shape legend: T tokens of the step, K inputs, N this rank's outputs, W room for a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flm.kernels.adapter_ops import AdapterOps, Factors, PackedAdapters
from flm.kernels.backend import Backend
from flm.worker.adapters.adapter import Adapter, cuts_inputs
from flm.worker.config import Span
from flm.worker.errors import BackendUnavailable
from flm.worker.layers.loading import Loading, StepInputs
from flm.worker.tensors.precision import fuse

Array = Any


class Adapted:
    """Nothing, where no adapter changes the product."""

    def __init__(self, loading: Loading, prefix: str, parts: Sequence[tuple[str, Span]]) -> None:
        """parts: as of ModelWeights.fused, the span being this rank's columns where it has some columns of the matrix."""
        each = [_factors(adapter, prefix, parts) for adapter in loading.adapters]
        self._packed: PackedAdapters | None = None
        if any(each):
            self._ops = adapter_ops(loading.backend)
            self._packed = self._ops.pack_adapters(each)
            self._room_TW = loading.workspace.array("adapter room", self._packed.width, dtype=np.float32)

    def add(self, x_TK: Array, out_TN: Array, inputs: StepInputs) -> None:
        """out[t] += what token t's adapter adds to the product with x[t]."""
        if self._packed is not None and inputs.adapter_T is not None:
            self._ops.adapt(x_TK, self._packed, inputs.adapter_T, self._room_TW[: len(x_TK)], out_TN)


def adapter_ops(backend: Backend) -> AdapterOps:
    """The backend itself. Raises BackendUnavailable where it has no adapters."""
    if not isinstance(backend, AdapterOps):
        raise BackendUnavailable("this device cannot run adapters yet; use device: cpu")
    return backend


def _factors(adapter: Adapter, prefix: str, parts: Sequence[tuple[str, Span]]) -> list[Factors]:
    """Parts that lie in one module of the checkpoint have their `down` in common and are one pair of factors."""
    found: list[Factors] = []
    column, last = 0, ""
    for name, span in parts:
        matrix = f"{prefix}{name}.weight"
        cut = cuts_inputs(matrix)
        module = adapter.modules.get(matrix, "")
        if module and module == last:
            before = found.pop()
            up = fuse([before.up, adapter.up(matrix, span)])
            found.append(Factors(before.down, up, before.scale, before.start))
        elif module:
            down, up = adapter.down(matrix, span if cut else None), adapter.up(matrix, None if cut else span)
            found.append(Factors(down, up, adapter.scale(matrix), column))
        column, last = column + span.size, module
    return found
