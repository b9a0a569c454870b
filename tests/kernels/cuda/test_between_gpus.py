"""What crosses GPUs, on a real one: mapped memory, waits that end, NCCL's calls, two processes that share the GPU.

Emulated where one process is enough; tests/worker/communication/test_comm_cuda.py emulates groups."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from emulated_group import EmulatedGroup
from emulator import EmulatedDevice
from kernel_checks import on_gpu

from flm.kernels.cuda import all_reduce as ops
from flm.kernels.cuda.links import Links
from flm.kernels.cuda.nccl import NcclLink, load_nccl, unique_id
from flm.kernels.errors import CollectiveAborted, CollectiveTimeout
from flm.worker import Engine, SamplingParams
from flm.worker.group.rank import GroupSpec, Rank
from flm.worker.request import Request

TESTS = Path(__file__).parents[2]
GOLDEN = TESTS / "data" / "golden"
needs_gpu = pytest.mark.skipif(not on_gpu(), reason="needs a GPU: make gpu-check")


@pytest.fixture(scope="module")
def device():
    if on_gpu():
        from flm.kernels.cuda.device import CupyDevice

        return CupyDevice()
    return EmulatedGroup(1, EmulatedDevice(ops.kernels("bfloat16"))).devices[0]


def links_of(device, world, timeout):
    """Rank 0 of a group whose other ranks never come."""
    places = [device.share(ops.data_bytes() + 4 * ops.SLOTS * world)[0] for _ in range(world)]
    data = np.array(places, np.uint64)
    arrays = [device.asarray(each) for each in (data, data + np.uint64(ops.data_bytes()))]
    epochs, (control, words) = device.asarray(np.zeros(ops.SLOTS, np.uint32)), device.host_words(2)
    exchange = ops.Exchange(0, world, *arrays, epochs, control, words)
    exchange.set_timeout(timeout)
    return Links(device, 0, world, exchange, None)


def test_a_group_of_one_keeps_its_own(device):
    rng, links = np.random.default_rng(0), links_of(device, 1, 10.0)
    for shape in ((1, 8), (3, 5000)):
        host = rng.standard_normal(shape).astype(np.float32)
        x = device.asarray(host)
        for _ in range(3):
            links.all_reduce(x)()
        out = device.empty(shape, "float32")
        links.all_gather_cols(x, out, (shape[1],))()
        assert np.array_equal(device.download(x), host) and np.array_equal(device.download(out), host)
    links.check()


def test_a_rank_that_does_not_come_is_named_in_time(device):
    links, x = links_of(device, 2, 0.2), device.asarray(np.ones(64, np.float32))
    began = time.monotonic()
    for _ in range(20):  # those after the first do not wait as long again
        links.all_reduce(x)()
    device.synchronize()
    assert not on_gpu() or time.monotonic() - began < 2.0  # the emulator's clock is its own
    with pytest.raises(CollectiveTimeout, match=r"rank 0 waited 0\.2 s in a collective; missing ranks: 1"):
        links.check()


@needs_gpu
def test_a_wait_under_way_ends_when_the_host_says_so(device):
    links, x = links_of(device, 2, 60.0), device.asarray(np.ones(64, np.float32))
    call = device.record([links.all_reduce(x)])
    began = time.monotonic()
    call()
    time.sleep(0.1)
    links.abort()
    device.synchronize()
    assert time.monotonic() - began < 5.0
    with pytest.raises(CollectiveAborted):
        links.check()


@needs_gpu
def test_nccl_moves_in_captured_steps(device):
    """A rank alone sends to itself: the calls, their arguments and the capture are those of a group."""
    nccl = load_nccl()
    link = NcclLink.join(nccl, 0, 1, unique_id(nccl), device, 60.0)
    rng = np.random.default_rng(0)
    for dtype in ("float32", "float16"):
        host = rng.standard_normal(1000).astype(dtype)
        x, y = device.asarray(host), device.empty((1000,), dtype)
        link.move([(0, x)], [(0, y)])
        assert np.array_equal(device.download(y), host)
        again = device.asarray(np.zeros(1000, dtype))
        device.record([lambda y=y, again=again: link.move([(0, y)], [(0, again)])])()
        assert np.array_equal(device.download(again), host)
        link.broadcast(x, 0)
    link.check()
    link.abort()
    link.check()


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_two_processes_sum(tmp_path, where):
    """Through the memory of the host, and through a GPU's that one has and the other maps, recorded too."""
    command = [sys.executable, str(TESTS / "worker" / "summing_process.py"), str(tmp_path)]
    ranks = [
        subprocess.Popen(
            [*command, str(r), "2", where], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    try:
        said = [rank.communicate(timeout=80) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], [errors[-1500:] for _, errors in said]
    found = json.loads(said[0][0].splitlines()[-1])
    assert list(found) == ["32", "60000", "32768"]
    if on_gpu() and "FLM_ROWS" in os.environ:
        with open(os.environ["FLM_ROWS"], "a", encoding="utf-8") as file:
            file.write(json.dumps({"what": "sums of two processes on one GPU, us by bytes", **found}) + "\n")


def group_of_two(tmp_path, device):
    spec = GroupSpec(
        "r0", "tiny", str(GOLDEN / "llama31"), device, tensor_parallel=2, max_sequences=2, max_step_tokens=32,
        run_dir=str(tmp_path), hang_timeout=3.0,
    )  # fmt: skip
    command = [sys.executable, str(TESTS / "worker" / "follower_process.py"), json.dumps(asdict(spec)), "1"]
    follower = subprocess.Popen(command)
    leader = Rank(spec, 0)
    leader.load(lambda fraction: None)
    leader.connect(timeout=120)
    events = queue.SimpleQueue()
    leader.replica.start(lambda found: [events.put(event) for event in found])
    return spec, leader, follower, events


def generated(leader, events, request):
    leader.replica.submit(request)
    tokens, last = [], None
    while last is None or last.finish_reason is None:
        last = events.get(timeout=60)
        tokens += last.token_ids
    return tuple(tokens), last


def check_two_processes(tmp_path, device):
    ids = tuple(np.load(GOLDEN / "llama31" / "ref.npz")["ids"].tolist())
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    spec, leader, follower, events = group_of_two(tmp_path, device)
    try:
        tokens, _ = generated(leader, events, Request("a", ids, params))
        with Engine(spec.path, device=device, max_sequences=2, max_step_tokens=32, kv_bytes=4 << 20) as one:
            assert one.generate([ids], params)[0].token_ids == tokens
        links = getattr(leader._comm, "links", None)
        assert device == "cpu" or (links.nccl is None and links.exchange is not None)
        os.kill(follower.pid, signal.SIGKILL)
        began = time.monotonic()
        _, last = generated(leader, events, Request("b", ids, replace(params, max_tokens=30)))
        assert time.monotonic() - began < 10.0
        assert "rank 1" in last.error and "rank 1" in leader.replica.failure
    finally:
        leader.close()
        follower.kill()
        follower.wait()


@needs_gpu
def test_two_processes_share_a_gpu(tmp_path):
    """They give one's tokens, through mapped memory, in captured steps; one that is killed is named."""
    check_two_processes(tmp_path, "cuda")
