"""What carries the values that cross the GPUs of a group: buffers that the ranks map from each other, NCCL, or both.

Short messages go through mapped buffers in one shot, long ones through NCCL; where only one of the two is there, it takes
all. Both give the same bits. Every rank must make the same calls.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flm.kernels.cuda import all_reduce as ops
from flm.kernels.cuda.graph import GraphDevice
from flm.kernels.cuda.nccl import NcclLink, load_nccl, unique_id
from flm.kernels.errors import KernelError, ToolkitMissing, UnsupportedDevice

Array = Any
Swap = Callable[[bytes], list[bytes]]  # gives every rank's bytes, in rank order
ONE_SHOT = 512 << 10  # bytes; longer messages go through NCCL, which moves fewer
SHARE_STEP = 8  # elements
log = logging.getLogger(__name__)


class PeerDevice(GraphDevice, Protocol):
    """A device that shares memory with other processes."""

    @property
    def bus(self) -> str:
        """Which GPU this is: the same in every process of its host."""
        ...

    def use(self) -> None:
        """Make it the calling thread's."""
        ...

    def stream(self) -> int:
        """The address of the current stream."""
        ...

    def synchronize(self) -> None:
        """Wait for what was launched."""
        ...

    def share(self, nbytes: int) -> tuple[int, bytes]:
        """The address of new memory, zeroed, and what another process maps it by."""
        ...

    def attach(self, handle: bytes) -> int:
        """The address of another process' memory. Raises UnsupportedDevice where it cannot be reached."""
        ...

    def host_words(self, count: int) -> tuple[Any, NDArray[np.int32]]:
        """Zeroed words that host and kernels both reach: a kernel's argument, and the host's view."""
        ...


class Links:
    """One rank's. At least one of `exchange` and `nccl` is there."""

    def __init__(
        self,
        device: PeerDevice,
        rank: int,
        world: int,
        exchange: ops.Exchange | None,
        nccl: NcclLink | None,
        one_shot: int = ONE_SHOT,
    ) -> None:
        assert exchange is not None or nccl is not None
        self.device, self.rank, self.world = device, rank, world
        self.exchange, self.nccl, self.one_shot = exchange, nccl, one_shot
        self._scratch: dict[tuple[str, int], Array] = {}
        self._widths: dict[tuple[int, ...], Array] = {}

    def _mapped(self, nbytes: int) -> ops.Exchange | None:
        """The buffers where they are to take a message that long."""
        return self.exchange if nbytes <= self.one_shot or self.nccl is None else None

    def all_reduce(self, x: Array) -> Callable[[], None]:
        """A call that makes x the sum over ranks. Everything is allocated here, so that the call can be captured."""
        exchange = self._mapped(x.size * x.dtype.itemsize)
        if exchange is not None:
            return lambda: ops.all_reduce(self.device, exchange, x)
        flat, own = x.reshape(-1), slice(*self._share(x.size, self.rank))
        length = own.stop - own.start
        parts = self._room(x.dtype.name, self.world * length).reshape(self.world, length)
        shares = {r: flat[slice(*self._share(x.size, r))] for r in range(self.world)}
        others = [r for r in range(self.world) if r != self.rank]

        def call() -> None:
            assert self.nccl is not None
            theirs = [(r, shares[r]) for r in others]
            self.nccl.move(theirs, [(r, parts[r]) for r in others])
            ops.sum_parts(self.device, parts, self.rank, flat[own])
            self.nccl.move([(r, flat[own]) for r in others], theirs)

        return call

    def all_reduce_rms_norm(
        self, delta_TE: Array, x_TE: Array, weight_E: Array, eps: float, out_TE: Array
    ) -> Callable[[], None] | None:
        """A call that makes x the sum of itself and all ranks' deltas, and out its norm, with the bits of the three ops
        and in one launch; delta keeps what it held. None where they are long, or cannot be mapped."""
        (T, E), exchange = delta_TE.shape, self.exchange
        nbytes = delta_TE.size * delta_TE.dtype.itemsize
        if exchange is None or nbytes > self.one_shot or not exchange.holds_rows(T, E):
            return None
        return lambda: ops.all_reduce_rms_norm(self.device, exchange, delta_TE, x_TE, weight_E, eps, out_TE)

    def _share(self, count: int, rank: int) -> tuple[int, int]:
        """The elements that a rank adds up; at least one for each, as far as they go."""
        step = -(-count // self.world)
        step = -(-step // SHARE_STEP) * SHARE_STEP if step >= SHARE_STEP else step
        return min(rank * step, count), min((rank + 1) * step, count)

    def all_gather_cols(self, x_SN: Array, out: Array, widths: tuple[int, ...]) -> Callable[[], None]:
        """A call that concatenates the ranks' columns."""
        S, columns = ops.check_widths(x_SN, out, self.rank, widths)
        if widths not in self._widths:
            self._widths[widths] = self.device.asarray(np.array(widths, np.int32))
        sizes = self._widths[widths]
        exchange = self._mapped(4 * S * max(widths))
        if exchange is not None:
            return lambda: ops.all_gather_cols(self.device, exchange, x_SN, out, widths, sizes)
        parts = self._room("float32", S * columns)
        ends = np.cumsum((0, *widths)).tolist()
        others = [r for r in range(self.world) if r != self.rank]

        def call() -> None:
            assert self.nccl is not None
            theirs = [(r, parts[S * ends[r] : S * ends[r + 1]]) for r in others]
            self.nccl.move([(r, x_SN) for r in others], theirs)
            ops.place_columns(self.device, parts, self.rank, x_SN, out, widths, sizes)

        return call

    def broadcast(self, x: Array, root: int) -> Callable[[], None]:
        """A call that makes x root's."""
        exchange, nccl = self._mapped(x.size * x.dtype.itemsize), self.nccl
        if exchange is not None:
            return lambda: ops.broadcast(self.device, exchange, x, root)
        assert nccl is not None
        return lambda: nccl.broadcast(x, root)

    def _room(self, dtype: str, count: int) -> Array:
        """Scratch of that many elements; kept, because captured calls go on using it."""
        rounded = 1 << max(count - 1, 1).bit_length()
        if (dtype, rounded) not in self._scratch:
            self._scratch[dtype, rounded] = self.device.empty((rounded,), dtype)
        return self._scratch[dtype, rounded][:count]

    def check(self) -> None:
        """Raises what has gone wrong: CollectiveTimeout, CollectiveFailed, CollectiveAborted."""
        if self.exchange is not None:
            self.exchange.raise_failure()
        if self.nccl is not None:
            self.nccl.check()

    def abort(self) -> None:
        """End all waits, present and later."""
        if self.exchange is not None:
            self.exchange.abort()
        if self.nccl is not None:
            self.nccl.abort()

    def set_timeout(self, seconds: float) -> None:
        if self.exchange is not None:
            self.exchange.set_timeout(seconds)


def open_links(
    device: PeerDevice, rank: int, world: int, swap: Swap, timeout: float, one_shot: int = ONE_SHOT
) -> Links:
    """Meet the other ranks of this host. All choose alike: NCCL takes part where every rank has a GPU of its own and the
    library, mapped buffers where every rank can map those of all. Raises UnsupportedDevice where neither can be."""
    nccl, why = _nccl_where_installed()
    uid = unique_id(nccl) if nccl is not None and rank == 0 else b""
    mine = {"bus": device.bus, "nccl": nccl is not None, "uid": uid.hex()}
    told = [json.loads(each) for each in swap(json.dumps(mine).encode())]
    with_nccl = len({each["bus"] for each in told}) == world and all(each["nccl"] for each in told)
    exchange, refused = _open_exchange(device, rank, world, swap)
    if exchange is None and not with_nccl:
        raise UnsupportedDevice(
            f"rank {rank}: its GPU reaches those of the other ranks neither through mapped memory ({refused}) nor through "
            f"NCCL ({why or 'two ranks share a GPU, or another rank lacks it'})"
        )
    link = None
    if with_nccl:
        link = NcclLink.join(nccl, rank, world, bytes.fromhex(told[0]["uid"]), device, timeout)
    if exchange is not None:
        exchange.set_timeout(timeout)
    return Links(device, rank, world, exchange, link, one_shot)


def _nccl_where_installed() -> tuple[Any, str]:
    try:
        return load_nccl(), ""
    except ToolkitMissing as error:
        log.info("without NCCL: %s", error)
        return None, str(error)


def _open_exchange(device: PeerDevice, rank: int, world: int, swap: Swap) -> tuple[ops.Exchange | None, str]:
    """The buffers of all ranks, or None and why not, where one of them cannot map those of all."""
    flags_at, refused = ops.data_bytes(), ""
    bases = [0] * world
    try:
        mine, handle = device.share(flags_at + 4 * ops.SLOTS * world)
    except KernelError as error:
        mine, handle, refused = 0, b"", str(error)
    handles = swap(handle)
    try:
        if all(handles):
            bases = [mine if r == rank else device.attach(handles[r]) for r in range(world)]
    except UnsupportedDevice as error:
        refused = str(error)
    if not all(reached == b"1" for reached in swap(b"1" if all(bases) else b"0")):
        return None, refused or "another rank cannot map it"
    control, words = device.host_words(2)
    places = [np.array(bases, np.uint64), np.array(bases, np.uint64) + np.uint64(flags_at)]
    data, flags = (device.asarray(place) for place in places)
    epochs = device.asarray(np.zeros(ops.SLOTS, np.uint32))
    return ops.Exchange(rank, world, data, flags, epochs, control, words), ""
