"""Collectives between threads and between processes, time-outs and aborts."""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
import time
from multiprocessing import shared_memory

import numpy as np
import pytest

from flm.kernels.errors import CollectiveAborted, CollectiveTimeout, ShapeError
from flm.kernels.group import Group


def on_threads(backends, body, slot_bytes=256, timeout=60.0):
    """Run body(backend, group) as so many ranks; their results in rank order."""
    size = len(backends)
    buffer = np.zeros(Group.buffer_bytes(size, slot_bytes), np.uint8)
    results: list[object] = [None] * size

    def rank(r: int) -> None:
        try:
            results[r] = body(backends[r], Group(buffer, r, size, timeout))
        except Exception as error:
            results[r] = error

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    return results


@pytest.fixture(scope="module")
def ranks(cpu1, exact):
    from flm.kernels.cpu.backend import CpuBackend

    return {
        "compiled": [CpuBackend(1) for _ in range(4)],
        "mixed": [CpuBackend(1), exact.__class__(), CpuBackend(1)],
    }


def all_ops(backend, group):
    """Every collective a few times over, with messages below, at and above a slot."""
    seen = []
    for count in (1, 63, 64, 65, 1000):
        rng = np.random.default_rng(count * 100 + group.rank)
        x = rng.standard_normal(count).astype(np.float32)
        backend.all_reduce(group, x)
        widths = tuple(5 + 3 * r for r in range(group.size))
        local = rng.standard_normal((count % 37 + 1, widths[group.rank])).astype(np.float32)
        gathered = np.zeros((len(local), sum(widths)), np.float32)
        backend.all_gather_cols(group, local, gathered, widths)
        y = rng.integers(0, 1000, count).astype(np.int32)
        backend.broadcast(group, y, group.size - 1)
        backend.barrier(group)
        seen += [x, local, gathered, y]
    return seen


@pytest.mark.parametrize("which", ["compiled", "mixed"])
def test_threads(ranks, which):
    results = on_threads(ranks[which], all_ops)
    size = len(results)
    for i, count in enumerate((1, 63, 64, 65, 1000)):
        parts = [
            np.random.default_rng(count * 100 + r).standard_normal(count).astype(np.float32)
            for r in range(size)
        ]
        want = parts[0].copy()
        for part in parts[1:]:
            want += part
        for result in results:
            assert np.array_equal(result[4 * i], want)
            assert np.array_equal(result[4 * i + 2], np.concatenate([r[4 * i + 1] for r in results], axis=1))
            assert np.array_equal(result[4 * i + 3], results[-1][4 * i + 3])


def test_captured(ranks):
    def body(backend, group):
        x = np.zeros(10, np.float32)
        with backend.capture() as graph:
            backend.all_reduce(group, x)
            backend.barrier(group)
        for i in range(200):
            x[:] = group.rank + i
            graph.replay()
            assert (x == 6 + 4 * i).all()
        return True

    assert on_threads(ranks["compiled"], body) == [True] * 4


@pytest.mark.parametrize("which", ["compiled", "mixed"])
def test_timeout_names_the_missing(ranks, which):
    def body(backend, group):
        backend.barrier(group)
        group.timeout = 0.5
        if group.rank == 1:
            return
        backend.all_reduce(group, np.ones(8, np.float32))

    results = on_threads(ranks[which], body)
    for r, result in enumerate(results):
        if r != 1:
            assert isinstance(result, CollectiveTimeout) and result.missing == (1,)
            assert f"rank {r} waited 0.5 s" in str(result) and "missing ranks: 1" in str(result)


@pytest.mark.parametrize("which", ["compiled", "mixed"])
def test_abort(ranks, which):
    def body(backend, group):
        if group.rank == 0:
            time.sleep(0.1)
            group.abort()
            return
        backend.barrier(group)

    start = time.monotonic()
    results = on_threads(ranks[which], body, timeout=60)
    assert time.monotonic() - start < 30
    assert all(isinstance(r, CollectiveAborted) for r in results[1:])


def process_rank(name: str, rank: int, size: int, results) -> None:
    from flm.kernels.cpu.backend import CpuBackend

    memory = shared_memory.SharedMemory(name)
    buffer = np.frombuffer(memory.buf, np.uint8)[: Group.buffer_bytes(size, 256)]
    group, backend = Group(buffer, rank, size, 60.0), CpuBackend(1)
    backend.barrier(group)  # they take seconds to start
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    x = np.full(1000, rank + 1, np.float32)
    for _ in range(50):
        x[:] = rank + 1
        backend.all_reduce(group, x)
    group.timeout = 2.0
    try:
        if rank != 2:
            backend.barrier(group)
    except CollectiveTimeout as error:
        results.put((rank, float(x[0]), error.missing))
    else:
        results.put((rank, float(x[0]), None))


def test_three_processes_on_one_core():
    size = 3
    memory = shared_memory.SharedMemory(create=True, size=Group.buffer_bytes(size, 256))
    try:
        memory.buf[:] = bytes(len(memory.buf))
        context = mp.get_context("spawn")
        results = context.Queue()
        processes = [
            context.Process(target=process_rank, args=(memory.name, r, size, results)) for r in range(size)
        ]
        for process in processes:
            process.start()
        seen = sorted(results.get(timeout=120) for _ in range(size))
        for process in processes:
            process.join(60)
        assert seen == [(r, 6.0, None if r == 2 else (2,)) for r in range(size)]
    finally:
        memory.close()
        memory.unlink()


def test_wrong_group():
    with pytest.raises(ShapeError, match="rank 2 of 2"):
        Group(np.zeros(4096, np.uint8), 2, 2)
    with pytest.raises(ShapeError, match="bytes expected for 4 ranks"):
        Group(np.zeros(100, np.uint8), 0, 4)
