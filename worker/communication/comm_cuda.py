"""CudaCommunicator: the ranks of a replica group on the GPUs of one host.

What crosses GPUs goes through flm.kernels.cuda.links and can be captured; the group's memory on the host serves to meet,
to tell of failures, and for each rank's pulse. Kernels that wait for a rank run on the GPU, so nothing raises where an op
is called: a step is `watched`, and at its end everything that went wrong raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flm.kernels.backend import Backend
from flm.kernels.cuda.links import ONE_SHOT, Links, PeerDevice, open_links
from flm.kernels.errors import CollectiveFailed, DeviceFailed
from flm.worker.communication.comm import GroupCommunicator, OneByOne
from flm.worker.communication.watchdog import Watchdog

Array = Any


class CudaCommunicator(OneByOne):
    """One rank's. Raises what open_links does; every rank must construct its own at the same time."""

    def __init__(
        self, meeting: GroupCommunicator, device: PeerDevice, timeout: float, one_shot: int = ONE_SHOT
    ) -> None:
        """`meeting`: the same ranks through the memory of the host, on a backend of `device`."""
        self._meeting, self.group, self.device = meeting, meeting.group, device
        self._backend: Any = meeting.backend
        self.rank, self.size, group = meeting.rank, meeting.size, meeting.group
        self.links: Links = open_links(device, group.rank, group.size, group.swap, timeout, one_shot)
        self._watchdog = Watchdog(group, self.links.check, self.links.abort)
        self._watchdog.start()

    def set_timeout(self, seconds: float) -> None:
        self.group.timeout = seconds
        self.links.set_timeout(seconds)

    def still(self) -> float | None:
        return None  # whoever waits for a GPU may spin: that is no sign of life

    def all_reduce(self, x: Array) -> None:
        self._backend.in_order(self.links.all_reduce(x))

    def all_reduce_rms_norm(
        self, ops: Backend, x_TE: Array, delta_TE: Array, weight_E: Array, eps: float, out_TE: Array
    ) -> None:
        """One launch, where the sum goes through mapped buffers in one shot."""
        fused = self.links.all_reduce_rms_norm(delta_TE, x_TE, weight_E, eps, out_TE)
        if fused is None:
            super().all_reduce_rms_norm(ops, x_TE, delta_TE, weight_E, eps, out_TE)
        else:
            self._backend.in_order(fused)

    def all_gather_cols(self, x_SN: Array, out_SN: Array, widths: tuple[int, ...]) -> None:
        self._backend.in_order(self.links.all_gather_cols(x_SN, out_SN, widths))

    def broadcast(self, x: Array, root: int = 0) -> None:
        self._backend.in_order(self.links.broadcast(x, root))

    def barrier(self) -> None:
        self.device.synchronize()
        self.group.swap(b"")

    def swap(self, mine: bytes) -> list[bytes]:
        return self.group.swap(mine)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around a step: it ends within the time-out, with all that was launched done. Raises CollectiveTimeout naming
        ranks that did not come, CollectiveFailed with NCCL's words, CollectiveAborted after another rank's failure."""
        with self.launching():
            yield
        with self.awaiting():
            self.device.synchronize()

    @contextmanager
    def launching(self) -> Iterator[None]:
        self._watchdog.begin()
        try:
            yield
        except Exception as error:
            self._watchdog.end()
            self._explain(error)
            raise

    @contextmanager
    def awaiting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._explain(error)
            raise
        finally:
            self._watchdog.end()
        self._raise_failure()

    def _explain(self, error: Exception) -> None:
        """What was aborted breaks in ways that explain nothing: raise the reason in its place. So does a kernel that reaches
        for memory of a rank which has died."""
        if (
            self._watchdog.failure is None
            and isinstance(error, DeviceFailed)
            and (gone := self._watchdog.gone())
        ):
            self.group.abort()
            names = " and ".join(f"rank {r}" for r in gone)
            raise CollectiveFailed(self.rank, f"{names} left the group, and then: {error}") from error
        if self._watchdog.failure is not None:
            raise self._watchdog.failure from error

    def _raise_failure(self) -> None:
        if self._watchdog.failure is not None:
            raise self._watchdog.failure
        try:
            self.links.check()
        except Exception:
            self.group.abort()
            raise

    def abort(self) -> None:
        self.group.abort()
        self._watchdog.stop()
        self.links.abort()
