"""A replica group of real processes: it serves, and its failures name the rank and leave nothing behind."""

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from flm.worker.errors import ConfigError, FlmError, RankFailed, Unavailable
from flm.worker.group.rank import GroupSpec, Rank
from flm.worker.plan import Scheduled, StepPlan
from flm.worker.request import FinishReason, Request, SamplingParams, TokenEvent

HERE = Path(__file__).parents[1]
MODEL = str(HERE.parent / "data" / "golden" / "llama2")
PARAMS = SamplingParams(max_tokens=40, seed=5, ignore_eos=True)
ENDLESS = Request("endless", (4, 5), SamplingParams(max_tokens=60, ignore_eos=True))
FEW_SECONDS = {"hang_timeout": 1.0}  # may pass while nothing is wrong


@dataclass
class Group:
    rank: Rank
    follower: subprocess.Popen[bytes]
    events: queue.SimpleQueue[TokenEvent]

    def collect(self) -> list[TokenEvent]:
        found = [self.events.get(timeout=60)]
        while found[-1].finish_reason is None:
            found.append(self.events.get(timeout=60))
        return found


def spec(run_dir: Path, **changes: object) -> GroupSpec:
    options = {
        "path": MODEL,
        "tensor_parallel": 2,
        "max_sequences": 4,
        "max_step_tokens": 32,
        "hang_timeout": 60.0,
    }
    return GroupSpec("r0", "tiny", run_dir=str(run_dir), **{**options, **changes})  # type: ignore[arg-type]


@pytest.fixture
def group(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Group]:
    """With what the test's parameter changes of the spec, if it has one."""
    plan = spec(tmp_path, **getattr(request, "param", {}))
    command = [sys.executable, str(HERE / "follower_process.py"), json.dumps(asdict(plan)), "1"]
    follower = subprocess.Popen(command)
    leader = Rank(plan, 0)
    leader.load(lambda fraction: None)
    leader.connect(timeout=120)
    events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
    leader.replica.start(lambda found: [events.put(event) for event in found])  # type: ignore[func-returns-value]
    yield Group(leader, follower, events)
    leader.close()
    follower.kill()
    follower.wait()


@pytest.mark.parametrize("group", [{}, {"overlap": True}], indirect=True, ids=["step by step", "ahead"])
def test_two_processes_generate_what_one_does(group: Group, tmp_path: Path) -> None:
    group.rank.replica.submit(Request("a", (1, 2, 3), PARAMS))
    tokens = [token for event in group.collect() for token in event.token_ids]
    alone = Rank(spec(tmp_path, tensor_parallel=1), 0)
    alone.load(lambda fraction: None)
    alone.connect()
    events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
    alone.replica.start(lambda found: [events.put(event) for event in found])  # type: ignore[func-returns-value]
    alone.replica.submit(Request("a", (1, 2, 3), PARAMS))
    want: list[int] = []
    while len(want) < 40:
        want += events.get(timeout=60).token_ids
    alone.close()
    assert tokens == want
    group.rank.replica.check()


def test_stop_ends_the_follower_and_leaves_no_shared_memory(group: Group) -> None:
    assert not list(Path(group.rank.spec.run_dir).glob("*.shm"))
    group.rank.close()
    assert group.follower.wait(timeout=60) == 0
    with pytest.raises(Unavailable, match="stopped"):
        group.rank.replica.submit(ENDLESS)


@pytest.mark.parametrize(
    ("group", "blow"),
    [
        (FEW_SECONDS, signal.SIGKILL),
        ({**FEW_SECONDS, "overlap": True}, signal.SIGKILL),
        (FEW_SECONDS, signal.SIGSTOP),
    ],
    indirect=["group"],
)
def test_a_rank_that_dies_or_hangs_is_named_within_the_bound(group: Group, blow: signal.Signals) -> None:
    """Ahead, it dies while steps are under way."""
    runner = group.rank.runner
    if runner.ahead:
        launch = runner.launch

        def launched(plan: StepPlan) -> None:
            if runner.in_flight and plan.step > 3:
                os.kill(group.follower.pid, blow)
                group.follower.wait()
            launch(plan)

        runner.launch = launched  # type: ignore[method-assign]
    else:
        os.kill(group.follower.pid, blow)
    began = time.monotonic()
    group.rank.replica.submit(ENDLESS)
    events = group.collect()
    last = events[-1]
    assert len(events) > 2 * runner.ahead  # tokens that were there are not lost
    assert time.monotonic() - began < 1.0 + 8.0  # and the default is 10
    assert last.finish_reason is FinishReason.ERROR
    assert "rank 1" in last.error
    assert (group.rank.replica.state, group.rank.replica.still()) == ("failed", 0.0)
    assert "rank 1" in group.rank.replica.failure
    group.rank.replica.check()
    with pytest.raises(Unavailable, match="rank 1"):
        group.rank.replica.submit(ENDLESS)


def test_a_follower_that_fails_says_why(group: Group) -> None:
    """Slot 3 of a plan that never introduced it: the follower's runner breaks, the leader reports its words."""
    channel = group.rank.replica._channel
    channel.send(StepPlan(0, [], [Scheduled(3, 0, 1, new_tokens=[1])], []))
    deadline = time.monotonic() + 60
    while not group.rank._comm.group.aborted and time.monotonic() < deadline:  # type: ignore[attr-defined]
        time.sleep(0.01)
    group.rank.replica.submit(ENDLESS)
    last = group.collect()[-1]
    assert last.finish_reason is FinishReason.ERROR
    assert "rank 1 failed" in last.error
    assert "KeyError" in last.error


def test_a_leader_without_followers_gives_up(tmp_path: Path) -> None:
    lonely = Rank(spec(tmp_path), 0)
    lonely.load(lambda fraction: None)
    with pytest.raises(RankFailed, match="missing ranks: 1"):
        lonely.connect(timeout=0.3)


def test_a_follower_without_a_leader_gives_up(tmp_path: Path) -> None:
    lonely = Rank(spec(tmp_path), 1)
    lonely.load(lambda fraction: None)
    with pytest.raises(RankFailed, match=r"waited 0\.3 s for rank 0"):
        lonely.connect(timeout=0.3)


def test_wrong_specs_are_refused_while_loading(tmp_path: Path) -> None:
    for changes, error, words in (
        ({"device": "tpu"}, FlmError, "expected cpu"),
        ({"activations": "float16"}, ConfigError, "expected auto on cpu, got 'float16'"),
        ({"tensor_parallel": 64}, ConfigError, "64 ranks are too many for 4"),
        ({"path": str(tmp_path / "nowhere")}, FlmError, "nowhere"),
    ):
        with pytest.raises(error, match=words):
            Rank(spec(tmp_path, **changes), 0).load(lambda fraction: None)
