"""The leader's loop: one thread on rank 0 that schedules, broadcasts, runs and postprocesses.

Where the scheduler goes ahead, the next step is scheduled, broadcast and launched before the result of the one that
runs is waited for, and the events of a step are handed out while the device is at work on later ones.

Other threads talk to it only through submit, cancel, drain, stop and load; the scheduler itself knows nothing of
threads. When a step fails, every live request ends with an ERROR event, the state becomes "failed" and names
the rank to blame; the controller then rebuilds the group, and the gateway resumes the streams elsewhere.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flm.kernels.errors import (
    CollectiveError,
    CollectiveTimeout,
    DeviceFailed,
    DeviceMemoryFull,
    KernelError,
)
from flm.worker.communication.channel import LeaderChannel
from flm.worker.config import ModelConfig
from flm.worker.errors import (
    BackendUnavailable,
    FlmError,
    InternalError,
    OutOfMemory,
    RankFailed,
    Unavailable,
)
from flm.worker.execution.runner import Runner
from flm.worker.limits import Load
from flm.worker.plan import StepPlan
from flm.worker.request import Request, TokenEvent
from flm.worker.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

OnEvents = Callable[[list[TokenEvent]], None]
FAREWELL = 0.3  # seconds given to a failing rank to say why
IDLE_CHECK = (
    1.0  # seconds without work, once, before blocks and slots are counted: a leak ends the group, named
)


class Replica:
    """A running replica group, seen from its leader. `state` is "ready", "draining", "failed" or "stopped"."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        channel: LeaderChannel,
        model_config: ModelConfig,
        max_context: int,
    ) -> None:
        self.model_config, self.max_context = model_config, max_context
        self.state, self.failure, self.step = "ready", "", 0
        self._scheduler, self._runner, self._channel = scheduler, runner, channel
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self.memory_facts = ""  # what is to be said of its device's memory where that is full
        self._cancelled: list[TokenEvent] = []
        self._flying: deque[StepPlan] = deque()  # launched and not collected, the oldest first
        self._undelivered: list[TokenEvent] = []  # of the last step that was collected
        self._borrowed = 0  # computations that have blocks of their own
        self._step_began = 0.0  # monotonic; 0 while idle
        self._thread = threading.Thread(target=self._loop, name="replica", daemon=True)
        self._on_events: OnEvents = lambda events: None

    def start(self, on_events: OnEvents) -> None:
        """Begin to serve. `on_events` is called once per engine step, on the loop's thread."""
        self._on_events = on_events
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises Overloaded, InvalidRequest, or Unavailable when this replica takes no more."""
        with self._lock:
            if self.state != "ready":
                raise Unavailable(
                    f"this replica is {self.state}{': ' + self.failure if self.failure else ''}"
                )
            self._scheduler.add(request, time.monotonic())
            self._wake.notify_all()

    def cancel(self, request_id: str) -> None:
        """End a request within one step; unknown or finished ones are ignored, for cancels race with ends."""
        with self._lock:
            event = self._scheduler.cancel(request_id, time.monotonic())
            if event is not None:
                self._cancelled.append(event)
                self._wake.notify_all()

    def drain(self) -> None:
        """Take no new requests; running ones go on."""
        with self._lock:
            if self.state == "ready":
                self.state = "draining"

    def stop(self) -> None:
        """Stop the loop; live requests end with an ERROR event, so that they can go on elsewhere."""
        with self._lock:
            if self.state != "failed":
                self.state = "stopped"
            self._wake.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def load(self) -> Load:
        with self._lock:
            return self._scheduler.load()

    def check(self) -> None:
        """Assert that every KV block and every slot is accounted for."""
        with self._lock:
            self._check()

    def _check(self) -> None:
        if self._borrowed:
            self._scheduler.pool.check()  # no table has those that are lent
        else:
            self._scheduler.check()

    @contextmanager
    def borrow_blocks(self, count: int) -> Iterator[list[int]]:
        """`count` KV blocks for a computation outside of any request, given back without contents. Where no request is
        live, no step is under way meanwhile."""
        with self._lock:
            self._wake.wait_for(lambda: self._scheduler.has_work or not self._flying)
            blocks = self._scheduler.pool.allocate(count)
            self._borrowed += 1
        try:
            yield blocks
        finally:
            with self._lock:
                self._scheduler.pool.release(blocks)
                self._borrowed -= 1

    def expert_counts(self) -> dict[int, list[int]]:
        """By layer, for those that have experts: how many tokens chose each one so far. From any thread, also while a step
        runs."""
        return {layer: counts.tolist() for layer, counts in self._runner.model.expert_counts().items()}

    def step_age(self) -> float:
        """Seconds since the present step began, 0 while idle."""
        began = self._step_began
        return time.monotonic() - began if began else 0.0

    def still(self) -> float:
        """Seconds in which the present step has shown no sign of life; its age where nobody looks for any."""
        still = self._runner.model.comm.still()
        return self.step_age() if still is None else still

    def _loop(self) -> None:
        try:
            while self._wait_for_work():
                self._launch()
                self._deliver()
                self._collect()
                if not self._flying:
                    self._deliver()
            while self._flying:  # no result may come out of a runner that someone else goes on to use
                self._runner.collect()
                self._flying.popleft()
            self._end("the replica was stopped", "stopped")
            self._channel.stop()
        except Exception as error:  # whatever it was, no stream may be left hanging
            self._fail(error)

    def _wait_for_work(self) -> bool:
        checked = False
        with self._lock:
            while self.state in ("ready", "draining") and not (
                self._scheduler.has_work or self._cancelled or self._flying
            ):
                self._step_began = 0.0
                if not self._wake.wait(None if checked else IDLE_CHECK):
                    self._check()
                    checked = True
            self._step_began = time.monotonic()
            return self.state in ("ready", "draining")

    def _launch(self) -> None:
        """Plan steps and start them, as far ahead as the scheduler goes."""
        while len(self._flying) <= self._scheduler.ahead:
            with self._lock:
                plan = self._scheduler.schedule(time.monotonic())
                if plan is None:
                    return
                self._flying.append(plan)
            self._channel.send(plan)
            if self._runner.awaits(plan):  # a whole step: what is known already is not held back so long
                self._deliver()
            self._runner.launch(plan)

    def _collect(self) -> None:
        """Wait for the oldest step, if there is one, and keep what it gives to be delivered."""
        result = self._runner.collect() if self._flying else None
        with self._lock:
            events: list[TokenEvent] = []
            if self._flying:
                assert result is not None, "the leader's runner samples"
                self.step += 1
                events = self._scheduler.postprocess(self._flying.popleft(), result, time.monotonic())
                if not self._flying:
                    self._wake.notify_all()  # whoever borrows blocks waits for that
            # taken now and not before: were the step to fail, their last events would be lost
            cancelled, self._cancelled = self._cancelled, []
            self._undelivered = cancelled + events

    def _deliver(self) -> None:
        events, self._undelivered = self._undelivered, []
        if events:
            self._on_events(events)

    def _fail(self, error: Exception) -> None:
        self.failure = self._blame(error)
        log.error(
            "replica failed: %s", self.failure, exc_info=error if not isinstance(error, FlmError) else None
        )
        try:
            self._end(self.failure, "failed")
        except Exception:  # followers must be told all the same
            log.exception("the last events of the replica's requests were not taken")
        self._channel.stop()  # those that still wait for a plan need not wait for ever

    def _blame(self, error: Exception) -> str:
        """Name the rank: one that said why it left, else those missing in the collective."""
        if isinstance(error, CollectiveError | RankFailed):
            said = self._channel.failures(FAREWELL)
            if isinstance(error, CollectiveTimeout):  # others only say that they were sent away
                said = {rank: why for rank, why in said.items() if rank in error.missing}
            if said:
                return "; ".join(f"rank {rank} failed: {why}" for rank, why in sorted(said.items()))
            if isinstance(error, CollectiveTimeout):
                return f"rank {', '.join(map(str, error.missing))} hung: {error}"
        if isinstance(error, RankFailed):
            return str(error)
        if isinstance(error, DeviceMemoryFull) and self.memory_facts:
            return f"rank 0: {error}; {self.memory_facts}"
        if isinstance(error, KernelError | FlmError):
            return f"rank 0: {error}"
        return f"rank 0: {type(error).__name__}: {error}"

    def _end(self, why: str, state: str) -> None:
        with self._lock:
            self.state, self._step_began = state, 0.0
            events = self._undelivered + self._cancelled + self._scheduler.fail_all(why)
            self._undelivered, self._cancelled = [], []
            self._flying.clear()
            self._wake.notify_all()
        self._on_events(events)


def as_flm_error(error: Exception) -> FlmError:
    """An error of the kernels or of ours, as the one tree that users see."""
    if isinstance(error, FlmError):
        return error
    if isinstance(error, CollectiveError):
        return RankFailed(str(error))
    if isinstance(error, DeviceMemoryFull):
        return OutOfMemory(str(error))
    if isinstance(error, DeviceFailed):
        return RankFailed(str(error))
    if isinstance(error, KernelError) and error.permanent:
        return BackendUnavailable(str(error))
    return InternalError(f"{type(error).__name__}: {error}")
