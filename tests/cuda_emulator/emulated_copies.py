"""Copies between the host and an emulated device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Copies:
    """A part of EmulatedDevice, where whatever is launched has been done when the call returns."""

    def upload(self, host: Array, array: Array) -> None:
        array[...] = host

    def download(self, array: Array) -> Array:
        return np.array(array)

    def page_locked(self, nbytes: int) -> Array:
        return np.full(nbytes, 0xFF, np.uint8)

    def send(self, host: Array, array: Array) -> Callable[[], None]:
        array[...] = host
        return lambda: None

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[Array]]:
        """The copies are made now: what is launched later may overwrite the arrays."""
        copies = [np.array(array) for array in arrays]
        return lambda: copies
