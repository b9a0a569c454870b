"""What stands between two steps of a device: the leader's loop, step by step and ahead.

    python benchmarks/leader_loop.py [--step 1.5] [--what steps] [--record]

The engine's own scheduler, loop, runner and CUDA backend, on a device that does nothing for a while on a thread of its own. What
CuPy and CUDA take for a call is not in it. `decode_rate` measures the same loop around any model.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
from results_table import add_row

from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.expert_ops import Routing
from flm.kernels.staging import DeviceMemory
from flm.worker.communication.channel import NoFollowers
from flm.worker.communication.comm import LocalCommunicator
from flm.worker.config import AttentionConfig, FeedForwardConfig, ModelConfig
from flm.worker.config_parts import ExpertsConfig, LatentConfig, NormConfig, RopeConfig
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


class HostArray(np.ndarray[Any, Any]):
    """Stands for an array of a GPU."""


class HollowGpu:
    """A GraphDevice whose launches do nothing, but for captured steps, which take the sleeping device's time."""

    processors = 132

    def __init__(self, sleeping: SleepingDevice) -> None:
        self._sleeping = sleeping
        self.launched = 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return np.zeros(shape, ml_dtypes.bfloat16 if str(dtype) == "bfloat16" else dtype).view(HostArray)

    def asarray(self, host: Array) -> Array:
        return np.array(host).view(HostArray)

    def page_locked(self, nbytes: int) -> Array:
        return np.zeros(nbytes, np.uint8)

    def upload(self, host: Array, array: Array) -> None:
        array[...] = host

    def send(self, host: Array, array: Array) -> Callable[[], None]:
        array[...] = host
        return lambda: None

    def download(self, array: Array) -> Array:
        return np.array(array)

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[Array]]:
        copies, step, device = [np.array(array) for array in arrays], self._sleeping.last, self._sleeping

        def wait() -> list[Array]:
            step.wait()
            device.read = time.perf_counter()
            return copies

        return wait

    def launch(self, *_: Any) -> None:
        self.launched += 1

    def enqueue(self, call: Callable[[int], None]) -> None:
        """No library is called."""

    def record(self, calls: list[Callable[[], None]]) -> Callable[[], None]:
        return self._sleeping.launch

    def prepare(self, kernels: Iterable[Any], progress: Any = None) -> None:
        """Nothing is compiled."""

    def memory(self) -> DeviceMemory:
        return DeviceMemory("hollow", 1 << 30, 1 << 30)


class NoModel:
    """Stands for a decoder of `rows` sequences."""

    def __init__(self, backend: CudaBackend, rows: int) -> None:
        attention = AttentionConfig(1, 1, 16, RopeConfig(1e4, 16))
        self.shard = SimpleNamespace(model=SimpleNamespace(attention=attention, vocab=VOCAB))
        self.adapters, self.comm = (), LocalCommunicator()
        self._logits_SV = backend.empty((rows, VOCAB))

    def hidden(self, inputs: Any) -> Array:
        return inputs.ids_T

    def logits(self, h_T: Array, rows_S: Array | None) -> Array:
        return self._logits_SV[: len(h_T if rows_S is None else rows_S)]


GREEDY = SamplingParams(STEPS, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(STEPS, temperature=1.0, top_p=0.9, repetition_penalty=1.1, ignore_eos=True)
# as many layers as the published models have, narrow ones
LLAMA = ModelConfig(
    "Llama, 32 layers", 256, 32, VOCAB, 8192, NormConfig(1e-5),
    AttentionConfig(4, 2, 64, RopeConfig(5e5, 64)), FeedForwardConfig(512),
)  # fmt: skip
DEEPSEEK = ModelConfig(
    "DeepSeek-V2, 27 layers", 256, 27, VOCAB, 8192, NormConfig(1e-6),
    AttentionConfig(4, 4, 96, RopeConfig(1e4, 32), latent=LatentConfig(128, 64, 32, 64)),
    FeedForwardConfig(512), ExpertsConfig(128, Routing(64, 6), 256, dense_layers=(0,)),
)  # fmt: skip


def measured(batch: int, ahead: int, params: SamplingParams, seconds: float) -> tuple[float, float, float]:
    """Microseconds, medians: of Python between reading a step and the next launch, of the device's idleness between two
    steps; and tokens per second."""
    device = SleepingDevice(seconds)
    backend = CudaBackend(HollowGpu(device))
    rate = decode_rate(NoModel(backend, batch), backend, batch, STEPS + BLOCK, ahead, params)
    settled = lambda values: 1e6 * statistics.median(values[len(values) // 4 :])
    return settled(device.between), settled(device.idle), rate


def launch_cost(model: ModelConfig, tokens: int = 64, rounds: int = 15) -> tuple[int, float]:
    """Launches of a prompt's step, which is not captured, and microseconds of Python for each."""
    from gpu_dummy import DummyBackend, DummyStep

    device = HollowGpu(SleepingDevice(0.0))
    step = DummyStep.build(DummyBackend(device), model, tokens, 128)
    times: list[float] = []
    for _ in range(rounds):
        device.launched, began = 0, time.perf_counter()
        step.decoder.logits(step.decoder.hidden(step.inputs), None)
        times.append(time.perf_counter() - began)
    return device.launched, 1e6 * statistics.median(times) / device.launched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=float, default=1.5, help="milliseconds of a step")
    parser.add_argument("--what", choices=("steps", "launches"), help="only these")
    parser.add_argument("--record", action="store_true", help="add the rows to RESULTS.md")
    arguments = parser.parse_args()
    for batch in (1, 16) if arguments.what != "launches" else ():
        for what, params in (("greedy", GREEDY), ("drawn, penalties", DRAWN)):
            found = [measured(batch, ahead, params, arguments.step / 1e3) for ahead in (0, 1)]
            cells = [f"{batch}, {what}"]
            for between, idle, rate in found:
                cells += [f"{between:.0f}", f"{idle:.0f}", f"{rate:.0f}"]
            print(" | ".join(cells), flush=True)
            if arguments.record:
                add_row("The leader's loop", *cells)
    for model in (LLAMA, DEEPSEEK) if arguments.what != "steps" else ():
        launches, cost = launch_cost(model)
        print(f"{model.family}: {launches} launches, {cost:.1f} us each", flush=True)


if __name__ == "__main__":
    main()
