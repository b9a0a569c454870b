"""An emulated device that does nothing before someone waits for it: what a GPU may do at the latest.

Launches and copies are carried out in order, but only as far as a wait goes. Host memory that a copy reads is read then: a
program that fills it again too early, or reads a result that is not there yet, gets wrong numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from emulator import Array, EmulatedDevice

from flm.kernels.cuda.kernel import Kernel


class LateDevice(EmulatedDevice):
    """Of the kernels that `base` has built. waits_with_more_to_do: waits that ended with later calls under way."""

    def __init__(self, base: EmulatedDevice) -> None:
        super().__init__([])
        self.processors, self._where = base.processors, base._where
        self.waits_with_more_to_do = 0
        self._under_way: deque[Callable[[], Any]] = deque()
        self._asked = self._done = 0

    def _later(self, call: Callable[[], Any]) -> Callable[[], None]:
        """Returns what waits until `call` was made."""
        self._under_way.append(call)
        self._asked += 1
        until = self._asked
        return lambda: self._wait(until)

    def _wait(self, until: int) -> None:
        while self._done < until:
            self._done += 1
            self._under_way.popleft()()
        self.waits_with_more_to_do += bool(self._under_way)

    def launch(
        self, kernel: Kernel, grid: tuple[int, ...], block: int, args: Sequence[Any], shared: int = 0
    ) -> None:
        kept, run = list(args), super().launch
        self._later(lambda: run(kernel, grid, block, kept, shared))

    def upload(self, host: Array, array: Array) -> None:
        staged, copy = np.array(host), super().upload
        self._later(lambda: copy(staged, array))

    def send(self, host: Array, array: Array) -> Callable[[], None]:
        copy = super().upload
        return self._later(lambda: copy(host, array))

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[Array]]:
        copies = [np.full_like(array, -7, subok=False) for array in arrays]

        def read() -> None:
            for copy, array in zip(copies, arrays, strict=True):
                copy[...] = array

        wait = self._later(read)
        return lambda: wait() or copies

    def download(self, array: Array) -> Array:
        self._wait(self._asked)
        return super().download(array)

    def enqueue(self, call: Callable[[int], None]) -> None:
        self._later(lambda: call(0))
