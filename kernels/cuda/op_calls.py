"""What parts of CudaBackend share: arrays of the host brought to the device, and buffers for results in between."""

from __future__ import annotations

from typing import Any

from flm.kernels.cuda.graph import Mirrors, on_host
from flm.kernels.cuda.step_calls import StepCalls

Array = Any


class OpCalls(StepCalls):
    """A part of CudaBackend."""

    _mirrors: Mirrors
    _areas: dict[tuple[str, str], Array]

    def _on_device(self, array: Array) -> Array:
        """The array, or the device's copy of one that the host fills."""
        if not on_host(array):
            return array
        mirror = self._mirrors.of(array)
        if self._graph is None:
            mirror.refresh()
        elif mirror not in self._graph.inputs:
            self._graph.inputs.append(mirror)
        return mirror.view(array)

    def _area(self, name: str, rows: int, columns: int, dtype: Any) -> Array:
        """[rows, columns] of a buffer that all ops of this name share, whatever their sizes; it grows where one needs more,
        and recorded ops keep the one that they have."""
        key, wanted = (name, str(dtype)), rows * columns
        if key not in self._areas or len(self._areas[key]) < wanted:
            self._areas[key] = self.device.empty((wanted,), dtype)
        return self._areas[key][:wanted].reshape(rows, columns)
