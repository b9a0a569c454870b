"""What stands between two steps of a device: the leader's loop, step by step and ahead.

    python benchmarks/leader_loop.py [--step 1.5] [--record]

The engine's own scheduler, loop and runner, on a device that does nothing for a while on a thread of its own. What calls of
CUDA cost is not in it. `decode_rate` measures the same loop around any model.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from results_table import add_row

from flm.kernels.staging import HostMemory
from flm.worker.communication.channel import NoFollowers
from flm.worker.communication.comm import LocalCommunicator
from flm.worker.config import AttentionConfig
from flm.worker.config_parts import RopeConfig
from flm.worker.execution.runner import Runner
from flm.worker.group.replica import Replica
from flm.worker.limits import Limits
from flm.worker.request import FinishReason, Request, SamplingParams, TokenEvent
from flm.worker.scheduling.blocks import BlockPool
from flm.worker.scheduling.scheduler import Scheduler

Array = Any
BLOCK = 16
VOCAB = 1000
STEPS = 300


def decode_rate(
    model: Any,
    backend: Any,
    batch: int,
    context: int,
    ahead: int,
    params: SamplingParams,
    max_tokens: int = 0,
) -> float:
    """Tokens per second of `batch` streams from one leader, once all of them decode. max_tokens: of a step."""
    runner = Runner(
        model,
        backend,
        block_size=BLOCK,
        max_context=context,
        max_sequences=batch,
        max_tokens=batch,
        leader=True,
        ahead=ahead,
    )
    backend.prepare(runner.rehearse, 1, lambda done: None)
    runner.capture_ahead()
    limits = Limits(batch, batch, batch, context)
    pool = BlockPool(batch * -(-context // BLOCK), BLOCK)
    scheduler = Scheduler(pool, limits, (), model.shard.model.vocab, ahead=ahead)
    replica = Replica(scheduler, runner, NoFollowers(), cast(Any, None), context)
    times: queue.SimpleQueue[tuple[float, bool]] = queue.SimpleQueue()

    def take(events: list[TokenEvent]) -> None:
        ended = {event.finish_reason for event in events} - {None}
        assert ended <= {FinishReason.LENGTH}, events
        times.put((time.perf_counter() if len(events) == batch else 0.0, bool(ended)))

    replica.start(take)
    for stream in range(batch):
        replica.submit(Request(f"{stream}", (1 + stream % 7,), params))
    found: list[float] = []
    ended = False
    while not ended:
        moment, ended = times.get(timeout=120)
        found += [moment] if moment else []
    replica.stop()
    assert not replica.failure, replica.failure
    found = found[len(found) // 4 :]
    return batch * (len(found) - 1) / (found[-1] - found[0])


class SleepingDevice:
    """Carries steps out in order, each in `seconds`. idle: before each step but the first; between: from the moment at which
    the host has read a step to its next launch."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._steps: queue.SimpleQueue[threading.Event] = queue.SimpleQueue()
        self.idle: list[float] = []
        self.between: list[float] = []
        self.read = 0.0
        self.last = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def launch(self) -> None:
        if self.read:
            self.between.append(time.perf_counter() - self.read)
        self.last = threading.Event()
        self._steps.put(self.last)

    def _run(self) -> None:
        ended = 0.0
        while True:
            step = self._steps.get()
            now = time.perf_counter()
            self.idle += [now - ended] if ended else []
            # it sleeps until shortly before its end, for a sleep ends late
            time.sleep(max(self._seconds - 2e-4, 0.0))
            while time.perf_counter() < now + self._seconds:
                time.sleep(0)
            ended = time.perf_counter()
            step.set()


class SleepingBackend(HostMemory):
    """What a runner asks of a backend, of that device."""

    asynchronous = True

    def __init__(self, device: SleepingDevice) -> None:
        self._device = device

    def decode_sizes(self, most: int) -> tuple[int, ...]:
        return (most,)

    def empty(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        return np.zeros(shape, dtype)

    def sample(self, *_: Any) -> None:
        """It always draws 0."""

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[Array]]:
        copies, step, device = [array.copy() for array in arrays], self._device.last, self._device

        def wait() -> list[Array]:
            step.wait()
            device.read = time.perf_counter()
            return copies

        return wait

    @contextmanager
    def capture(self) -> Iterator[Any]:
        yield SimpleNamespace(replay=self._device.launch)


class NoModel:
    """Stands for a decoder."""

    def __init__(self) -> None:
        attention = AttentionConfig(1, 1, 16, RopeConfig(1e4, 16))
        self.shard = SimpleNamespace(model=SimpleNamespace(attention=attention, vocab=VOCAB))
        self.adapters, self.comm = (), LocalCommunicator()

    def hidden(self, inputs: Any) -> Array:
        return None

    def logits(self, h: Array, rows_S: Array) -> Array:
        return np.zeros((1, VOCAB), np.float32)


GREEDY = SamplingParams(STEPS, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(STEPS, temperature=1.0, top_p=0.9, repetition_penalty=1.1, ignore_eos=True)


def measured(batch: int, ahead: int, params: SamplingParams, seconds: float) -> tuple[float, float, float]:
    """Microseconds, medians: of Python between reading a step and the next launch, of the device's idleness between two
    steps; and tokens per second."""
    device = SleepingDevice(seconds)
    rate = decode_rate(NoModel(), SleepingBackend(device), batch, STEPS + BLOCK, ahead, params)
    settled = lambda values: 1e6 * statistics.median(values[len(values) // 4 :])
    return settled(device.between), settled(device.idle), rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=float, default=1.5, help="milliseconds of a step")
    parser.add_argument("--record", action="store_true", help="add the rows to RESULTS.md")
    arguments = parser.parse_args()
    for batch in (1, 16):
        for what, params in (("greedy", GREEDY), ("drawn, penalties", DRAWN)):
            found = [measured(batch, ahead, params, arguments.step / 1e3) for ahead in (0, 1)]
            cells = [f"{batch}, {what}"]
            for between, idle, rate in found:
                cells += [f"{between:.0f}", f"{idle:.0f}", f"{rate:.0f}"]
            print(" | ".join(cells), flush=True)
            if arguments.record:
                add_row("The leader's loop", *cells)


if __name__ == "__main__":
    main()
