"""Ranks on GPUs: emulated devices whose launches meet, and a fake NCCL with CuPy's calls. Every rank is a thread."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulated_group import EmulatedGroup
from emulator import EmulatedDevice
from fake_nccl import BROKEN, REMOTE, FakeNccl

from flm.kernels.cuda.all_reduce import kernels
from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.cuda.elementwise import rms_norm_kernel
from flm.kernels.errors import (
    CollectiveAborted,
    CollectiveFailed,
    CollectiveTimeout,
    DeviceFailed,
    UnsupportedDevice,
)
from flm.worker.communication import watchdog
from flm.worker.communication.comm import ThreadCommunicator
from flm.worker.communication.comm_cuda import CudaCommunicator

WORLD = 3
WIDTHS = (5, 1, 8)
Body = Callable[[CudaCommunicator], Any]


@pytest.fixture(scope="module")
def base() -> EmulatedDevice:
    norms = [rms_norm_kernel("float32", "bfloat16", E) for E in (8, 12)]
    return EmulatedDevice([*kernels("bfloat16"), *norms])


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> FakeNccl:
    module = FakeNccl()
    install(monkeypatch, module)
    return module


def install(monkeypatch: pytest.MonkeyPatch, nccl: Any) -> None:
    cuda = SimpleNamespace(nccl=nccl)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)


def on_ranks(group: EmulatedGroup, body: Body, timeout: float = 20.0, one_shot: int = 1 << 20) -> list[Any]:
    """What body returns, or raises, on each rank."""
    world = len(group.devices)
    results: list[Any] = [None] * world
    buffer = ThreadCommunicator.buffer(world)

    def rank(number: int) -> None:
        device, comm = group.devices[number], None
        try:
            meeting = ThreadCommunicator(buffer, number, world, CudaBackend(device), timeout)  # type: ignore[arg-type]
            comm = CudaCommunicator(meeting, device, timeout, one_shot)  # type: ignore[arg-type]
            results[number] = body(comm)
        except Exception as error:
            results[number] = error
            if comm is not None:
                comm.abort()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def exchange(comm: CudaCommunicator) -> list[np.ndarray]:
    """Sums of both dtypes, columns and a broadcast, in a recorded step that is replayed."""
    rng, device = np.random.default_rng(comm.rank), comm.device
    wide = device.asarray(rng.standard_normal((2, 33)).astype(np.float32) * 10.0**comm.rank)
    narrow = device.asarray(rng.standard_normal((1, 8)).astype(ml_dtypes.bfloat16))
    tiny = device.asarray(np.full(2, 1.0 + comm.rank, np.float32))
    mine = device.asarray(rng.standard_normal((2, WIDTHS[comm.rank])).astype(np.float32))
    columns, said = (
        device.empty((2, sum(WIDTHS)), np.float32),
        device.asarray(np.full(4, comm.rank, np.float32)),
    )
    with comm._backend.capture() as graph:
        for x in (wide, narrow, tiny):
            comm.all_reduce(x)
        comm.all_gather_cols(mine, columns, WIDTHS)
        comm.broadcast(said, 1)
    assert not graph.waits
    found = []
    for _ in range(2):
        with comm.watched():
            graph.replay()
        found = [np.array(a) for a in (wide, narrow, tiny, columns, said)]
    comm.barrier()
    return found


def expected() -> list[np.ndarray]:
    rngs = [np.random.default_rng(rank) for rank in range(WORLD)]
    wide = [rng.standard_normal((2, 33)).astype(np.float32) * 10.0**r for r, rng in enumerate(rngs)]
    narrow = [rng.standard_normal((1, 8)).astype(ml_dtypes.bfloat16) for rng in rngs]
    columns = np.concatenate([rng.standard_normal((2, w)) for rng, w in zip(rngs, WIDTHS, strict=True)], 1)

    def total(parts: list[np.ndarray]) -> np.ndarray:
        result = np.zeros(parts[0].shape, np.float32)
        for part in parts:
            result += part.astype(np.float32)
        return result.astype(parts[0].dtype)

    twice = [total([total(parts)] * WORLD) for parts in (wide, narrow)]
    return [*twice, np.full(2, 18, np.float32), columns.astype(np.float32), np.full(4, 1, np.float32)]


@pytest.mark.parametrize("way", ["mapped", "nccl", "both"])
def test_every_way_gives_the_same_bits(base: EmulatedDevice, nccl: FakeNccl, way: str) -> None:
    """ "both": all but the shortest messages go through NCCL."""
    group = EmulatedGroup(WORLD, base, shared_gpu=way == "mapped", mappable=way != "nccl")
    results = on_ranks(group, exchange, one_shot=64)
    for found in results:
        assert not isinstance(found, Exception), found
        for got, want in zip(found, expected(), strict=True):
            np.testing.assert_array_equal(got, want)
    assert bool(nccl.calls) == (way != "mapped")
    assert all(device.recorded == 1 for device in group.devices)
    assert not any(comm.aborted.is_set() for comm in nccl.comms.values())


ROWS = (
    (2, 16),
    (4, 16),
    (3, 12),
    (65, 8),
)  # beside one_shot = 64: short, long, of an odd width, more than slots
FUSED = {"mapped": 2, "nccl": 0, "both": 1}


def residual_and_norm(comm: CudaCommunicator) -> None:
    """A sum that is added and normed, recorded and replayed, against the three ops one by one."""
    rng, shared, device = np.random.default_rng(comm.rank), np.random.default_rng(9), comm.device
    pairs = []
    with comm._backend.capture() as graph:
        for T, E in ROWS:
            x, delta = (
                shared.standard_normal((T, E)).astype(np.float32),
                rng.standard_normal((T, E)) * 5.0**comm.rank,
            )
            weight = device.asarray(shared.standard_normal(E).astype(np.float32))
            arrays = [[device.asarray(x), device.asarray(delta.astype(ml_dtypes.bfloat16))] for _ in range(2)]
            outs = [device.empty((T, E), "bfloat16") for _ in range(2)]
            comm.all_reduce_rms_norm(comm._backend, *arrays[0], weight, 1e-5, outs[0])
            comm.all_reduce(arrays[1][1])
            comm._backend.add_rms_norm(*arrays[1], weight, 1e-5, outs[1])
            pairs += [(arrays[0][0], arrays[1][0]), (outs[0], outs[1])]
    with comm.watched():
        graph.replay()
    comm.barrier()
    for fused, one_by_one in pairs:
        np.testing.assert_array_equal(np.array(fused), np.array(one_by_one))


@pytest.mark.parametrize("way", FUSED)
def test_a_sum_that_is_added_and_normed_has_the_bits_of_the_ops(
    base: EmulatedDevice, nccl: FakeNccl, way: str
) -> None:
    group = EmulatedGroup(WORLD, base, shared_gpu=way == "mapped", mappable=way != "nccl")
    one_shot = 64 if way == "both" else 1 << 20
    assert on_ranks(group, residual_and_norm, one_shot=one_shot) == [None] * WORLD
    assert [device.launched["all_reduce_rms_norm"] for device in group.devices] == [FUSED[way]] * WORLD


def test_ranks_that_can_neither_map_nor_use_nccl_say_so(
    base: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, SimpleNamespace(available=False))
    group = EmulatedGroup(2, base, shared_gpu=False, mappable=False)
    for error in on_ranks(group, lambda comm: None):
        assert isinstance(error, UnsupportedDevice)
        assert "cannot be mapped: cudaErrorPeer" in str(error) and "nvidia-nccl-cu13" in str(error)


def a_sum(comm: CudaCommunicator) -> None:
    with comm.watched():
        comm.all_reduce(comm.device.asarray(np.ones(64, np.float32)))


def test_a_rank_that_does_not_come_to_mapped_memory_is_named(base: EmulatedDevice, nccl: FakeNccl) -> None:
    group = EmulatedGroup(2, base)
    group.devices[0].patience = 0.1
    found = on_ranks(group, lambda comm: a_sum(comm) if comm.rank == 0 else None)
    assert isinstance(found[0], CollectiveTimeout) and found[0].missing == (1,)


def test_an_error_of_nccl_on_one_rank_ends_all(base: EmulatedDevice, nccl: FakeNccl) -> None:
    """Rank 1's link breaks while rank 0 waits for it."""
    group = EmulatedGroup(2, base, shared_gpu=False, mappable=False)

    def body(comm: CudaCommunicator) -> None:
        if comm.rank == 0:
            a_sum(comm)
            return
        nccl.comms[1].error = REMOTE
        while comm._watchdog.failure is None:
            time.sleep(0.005)
        raise comm._watchdog.failure

    found = on_ranks(group, body)
    assert isinstance(found[0], CollectiveAborted)
    assert isinstance(found[1], CollectiveFailed) and f"rank 1: NCCL said {REMOTE}" in str(found[1])
    assert all(comm.aborted.is_set() for comm in nccl.comms.values())


def test_a_call_that_nccl_refuses_names_the_rank(base: EmulatedDevice, nccl: FakeNccl) -> None:
    group = EmulatedGroup(2, base, shared_gpu=False, mappable=False)

    def body(comm: CudaCommunicator) -> None:
        nccl.comms[comm.rank].refuses = comm.rank == 1
        a_sum(comm)

    found = on_ranks(group, body)
    assert isinstance(found[0], CollectiveAborted)
    assert isinstance(found[1], CollectiveFailed) and BROKEN in str(found[1])


def test_a_rank_that_dies_in_the_middle_is_named_in_time(base: EmulatedDevice, nccl: FakeNccl) -> None:
    """Rank 1 neither comes nor shows a pulse any more; what rank 0 waits for in NCCL is aborted."""
    group = EmulatedGroup(3, base, shared_gpu=False, mappable=False)

    def body(comm: CudaCommunicator) -> None:
        comm.barrier()
        comm.set_timeout(0.2)
        if comm.rank == 1:
            comm._watchdog.stop()
            comm._watchdog._thread.join()
            comm._watchdog._line[2] -= 10**10
            return
        a_sum(comm)

    found = on_ranks(group, body)
    assert isinstance(found[0], CollectiveTimeout | CollectiveAborted)
    blamed = [error.missing for error in (found[0], found[2]) if isinstance(error, CollectiveTimeout)]
    assert blamed and all(1 in missing for missing in blamed)


@pytest.mark.parametrize("dead", [True, False])
def test_a_gpu_that_fails_because_a_rank_died_names_it(
    base: EmulatedDevice, nccl: FakeNccl, dead: bool
) -> None:
    """What a kernel reaches of a dead rank's memory may be there no more; a GPU that fails by itself says so."""
    group = EmulatedGroup(2, base)

    def body(comm: CudaCommunicator) -> None:
        comm._watchdog.stop()
        comm._watchdog._thread.join()
        comm._watchdog._line[watchdog.PULSE] = 0 if dead else 2**62
        comm.barrier()
        if comm.rank == 0:
            with comm.watched():
                raise DeviceFailed("0", "an illegal memory access was encountered")

    error = on_ranks(group, body)[0]
    assert isinstance(error, CollectiveFailed if dead else DeviceFailed) and "illegal memory" in str(error)
    assert ("rank 1 left the group" in str(error)) == dead


def test_ranks_that_do_not_join_nccl_are_waited_for_in_vain(base: EmulatedDevice, nccl: FakeNccl) -> None:
    """NCCL would wait for ever for a rank that has met the others and died before it joined."""
    group = EmulatedGroup(2, base, shared_gpu=False, mappable=False)
    joined = nccl.NcclCommunicator

    def join(ndev: int, uid: bytes, rank: int) -> Any:
        if rank == 1:
            raise nccl.NcclError(BROKEN)
        return joined(ndev, uid, rank)

    nccl.NcclCommunicator = join  # type: ignore[method-assign]
    found = on_ranks(group, lambda comm: None, timeout=0.3)
    assert isinstance(found[0], CollectiveTimeout) and found[0].missing == (1,)
    assert isinstance(found[1], CollectiveFailed) and "could not join 2 ranks" in str(found[1])
