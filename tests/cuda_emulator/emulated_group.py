"""Emulated GPUs of one group: ranks are threads, and launches that wait for other ranks run side by side as streams."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cupy_arrays import memory_of
from emulator import Array, EmulatedDevice, guarded
from numpy.typing import NDArray

from flm.kernels.cuda.kernel import Kernel
from flm.kernels.errors import UnsupportedDevice

ALONE = ("sum_parts", "place_columns")  # kernels of all_reduce.cu that wait for nobody
PATIENCE = 120.0  # seconds for a rank to come


class EmulatedGroup:
    """What the ranks' devices share. `shared_gpu`: all are one GPU; `mappable`: whether memory can be mapped."""

    def __init__(
        self, world: int, base: EmulatedDevice, shared_gpu: bool = True, mappable: bool = True
    ) -> None:
        self.base, self.mappable, self.setting = base, mappable, 12
        self.devices = [EmulatedRank(self, r, "0000:01:00.0" if shared_gpu else f"0000:0{r}:00.0") for r in range(world)]  # fmt: skip
        self._waiting: dict[int, tuple[Any, ...]] = {}
        self._meeting = threading.Condition()
        self._round, self._error = 0, None

    def launch_together(self, rank: int, launch: tuple[Any, ...]) -> None:
        """Run the launches of all ranks once each has brought one; without those that are not there in time."""
        with self._meeting:
            self._waiting[rank], mine = launch, self._round
            all_here = len(self._waiting) == len(self.devices)
            patience = self.devices[rank].patience
            if all_here or not self._meeting.wait_for(lambda: self._round > mine, patience):
                self._run()
            if self._error is not None:
                raise self._error

    def _run(self) -> None:
        launches = sorted(self._waiting.items())
        self._waiting = {}
        try:
            self.base.setting = self.setting
            self.base.launch_streams([launch for _, launch in launches], [rank for rank, _ in launches])
        except Exception as error:
            self._error = error
        finally:
            self._round += 1
            self._meeting.notify_all()


class EmulatedRank:
    """The PeerDevice of one rank."""

    patience = PATIENCE

    def __init__(self, group: EmulatedGroup, rank: int, bus: str) -> None:
        self._group, self._rank, self.bus = group, rank, bus
        self.processors = group.base.processors
        self.recorded = 0
        self.launched: Counter[str] = Counter()  # by kernel
        self._kept: list[Array] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group.base, name)  # empty, asarray, upload, download, free_memory

    def launch(
        self, kernel: Kernel, grid: tuple[int, ...], block: int, args: Sequence[Any], shared: int = 0
    ) -> None:
        launch = (kernel, grid, block, [memory_of(a) for a in args], shared)
        self.launched[kernel.name.partition("<")[0].rpartition("::")[2]] += 1
        if kernel.source == "all_reduce.cu" and not any(name in kernel.name for name in ALONE):
            self._group.launch_together(self._rank, launch)
        else:
            self._group.base.launch_streams([launch], None)

    def record(self, calls: list[Callable[[], None]]) -> Callable[[], None]:
        self.recorded += 1
        return lambda: [call() for call in calls] and None

    def use(self) -> None:
        """A thread has no device of its own here."""

    def stream(self) -> int:
        return 0

    def synchronize(self) -> None:
        """Launches have run when they return."""

    def share(self, nbytes: int) -> tuple[int, bytes]:
        memory = guarded(np.zeros(nbytes, np.uint8))
        self._kept.append(memory)
        return memory.ctypes.data, memory.ctypes.data.to_bytes(8, "little")

    def attach(self, handle: bytes) -> int:
        if not self._group.mappable:
            raise UnsupportedDevice(
                "memory of another rank's GPU cannot be mapped: cudaErrorPeerAccessUnsupported"
            )
        return int.from_bytes(handle, "little")

    def host_words(self, count: int) -> tuple[Any, NDArray[np.int32]]:
        words = guarded(np.zeros(count, np.int32))
        return words, words
