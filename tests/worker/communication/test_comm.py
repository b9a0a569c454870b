"""Communicators: every rank gets the same bits, a rank that is missing is named, nothing stays behind."""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flm.kernels.backend import Backend
from flm.kernels.cpu.backend import CpuBackend, warm
from flm.kernels.errors import CollectiveAborted, CollectiveTimeout
from flm.kernels.reference import ReferenceBackend
from flm.worker.communication.comm import (
    Communicator,
    GroupCommunicator,
    LocalCommunicator,
    SharedMemoryCommunicator,
    ThreadCommunicator,
)
from flm.worker.errors import RankFailed

SIZE = 3
WIDTHS = (5, 1, 8)  # uneven on purpose
Body = Callable[[GroupCommunicator], Any]


def on_ranks(make: Callable[[int], GroupCommunicator], body: Body, size: int = SIZE) -> list[Any]:
    """What body returns, or raises, on each rank."""
    results: list[Any] = [None] * size

    def rank(number: int) -> None:
        try:
            results[number] = body(make(number))
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    return results


def over_threads(timeout: float = 60.0, backend: Callable[[], Backend] = lambda: CpuBackend(1)) -> Any:
    buffer = ThreadCommunicator.buffer(SIZE)
    return lambda rank: ThreadCommunicator(buffer, rank, SIZE, backend(), timeout)


def over_a_file(path: Path, timeout: float = 60.0) -> Any:
    return lambda rank: SharedMemoryCommunicator(path, rank, SIZE, CpuBackend(1), timeout)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Kernels are compiled before ranks begin to wait for each other."""
    warm(1)


@pytest.fixture(params=["threads", "reference", "file"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "file":
        return over_a_file(tmp_path / "group.shm")
    return over_threads(backend=ReferenceBackend if request.param == "reference" else lambda: CpuBackend(1))


def own(rank: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(rank).standard_normal(shape).astype(np.float32) * 10.0**rank


@pytest.mark.parametrize("shape", [(1,), (7, 33), (70_001,)])  # the last is longer than a slot
def test_sums_are_the_same_bits_everywhere_and_right(make: Any, shape: tuple[int, ...]) -> None:
    def body(comm: GroupCommunicator) -> np.ndarray:
        x = own(comm.rank, shape)
        comm.all_reduce(x)
        return x

    results = on_ranks(make, body)
    exact = sum(own(rank, shape).astype(np.float64) for rank in range(SIZE))
    for result in results:
        np.testing.assert_array_equal(result, results[0])
        np.testing.assert_allclose(result, exact, rtol=1e-5, atol=1e-4)


def test_a_sum_does_not_depend_on_what_is_summed_beside_it(make: Any) -> None:
    def body(comm: GroupCommunicator) -> tuple[np.ndarray, np.ndarray]:
        rows = own(comm.rank, (9, 65))
        alone = rows[4].copy()
        comm.all_reduce(rows)
        comm.all_reduce(alone)
        return rows[4], alone

    for beside, alone in on_ranks(make, body):
        np.testing.assert_array_equal(beside, alone)


@pytest.mark.parametrize("rows", [1, 6])
def test_uneven_columns_are_joined_in_rank_order(make: Any, rows: int) -> None:
    def body(comm: GroupCommunicator) -> np.ndarray:
        out = np.full((rows, sum(WIDTHS)), np.nan, np.float32)
        comm.all_gather_cols(own(comm.rank, (rows, WIDTHS[comm.rank])), out, WIDTHS)
        return out

    whole = np.concatenate([own(rank, (rows, WIDTHS[rank])) for rank in range(SIZE)], axis=1)
    for result in on_ranks(make, body):
        np.testing.assert_array_equal(result, whole)


@pytest.mark.parametrize("root", range(SIZE))
def test_everyone_gets_the_roots_values(make: Any, root: int) -> None:
    def body(comm: GroupCommunicator) -> np.ndarray:
        x = own(comm.rank, (13,))
        comm.broadcast(x, root)
        return x

    for result in on_ranks(make, body):
        np.testing.assert_array_equal(result, own(root, (13,)))


def test_nobody_passes_a_barrier_before_all_are_there(make: Any) -> None:
    def body(comm: GroupCommunicator) -> tuple[float, float]:
        time.sleep(0.05 * comm.rank)
        came = time.monotonic()
        comm.barrier()
        return came, time.monotonic()

    results = on_ranks(make, body)
    assert min(left for _, left in results) >= max(came for came, _ in results)


def test_a_rank_that_stays_away_is_named() -> None:
    def body(comm: GroupCommunicator) -> None:
        if comm.rank != 1:
            comm.all_reduce(np.ones(4, np.float32))

    results = on_ranks(over_threads(timeout=1.0), body)
    assert results[1] is None
    for result in (results[0], results[2]):
        assert isinstance(result, CollectiveTimeout)
        assert result.missing == (1,)


def test_abort_frees_those_that_wait_and_those_to_come(make: Any) -> None:
    def body(comm: GroupCommunicator) -> Exception | None:
        if comm.rank == 2:
            time.sleep(0.1)
            comm.abort()
        else:
            with pytest.raises(CollectiveAborted):
                comm.barrier()
        with pytest.raises(CollectiveAborted):
            comm.all_reduce(np.ones(4, np.float32))
        return None

    began = time.monotonic()
    assert on_ranks(make, body) == [None] * SIZE
    assert time.monotonic() - began < 30  # of the 60 s that it would have waited


def test_a_group_of_one_changes_nothing() -> None:
    comm: Communicator = LocalCommunicator()
    x = own(0, (4, 3))
    comm.all_reduce(x)
    comm.broadcast(x)
    comm.all_gather_cols(x, x, (3,))
    comm.barrier()
    comm.abort()
    comm.barrier()
    np.testing.assert_array_equal(x, own(0, (4, 3)))
    assert (comm.rank, comm.size) == (0, 1)


def test_the_file_has_no_name_once_all_have_joined(tmp_path: Path) -> None:
    path = tmp_path / "group.shm"
    assert on_ranks(over_a_file(path), lambda comm: comm.size) == [SIZE] * SIZE
    assert os.listdir(tmp_path) == []


def test_a_leader_that_never_opens_is_not_waited_for_without_end(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"rank 1 waited 0\.2 s for rank 0 to open"):
        SharedMemoryCommunicator(tmp_path / "group.shm", 1, SIZE, CpuBackend(1), 0.2)
    assert os.listdir(tmp_path) == []


def test_a_follower_that_never_joins_is_named(tmp_path: Path) -> None:
    with pytest.raises(CollectiveTimeout) as caught:
        SharedMemoryCommunicator(tmp_path / "group.shm", 0, 2, CpuBackend(1), 0.3)
    assert caught.value.missing == (1,)
    assert os.listdir(tmp_path) == []


def in_a_process(path: Path, rank: int, results: Any) -> None:
    comm = SharedMemoryCommunicator(path, rank, 2, CpuBackend(1), 60.0)
    x = own(rank, (500,))
    for _ in range(20):
        comm.all_reduce(x)
    results.put((rank, x.tobytes()))


def test_processes_agree_bit_by_bit_with_threads(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=in_a_process, args=(tmp_path / "group.shm", rank, results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    seen = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)

    def body(comm: GroupCommunicator) -> bytes:
        x = own(comm.rank, (500,))
        for _ in range(20):
            comm.all_reduce(x)
        return x.tobytes()

    buffer = ThreadCommunicator.buffer(2)
    threads = on_ranks(lambda rank: ThreadCommunicator(buffer, rank, 2, CpuBackend(1), 60.0), body, 2)
    assert seen == {0: threads[0], 1: threads[0]}
    assert os.listdir(tmp_path) == []
