"""What befell a replica is remembered: it is given up in the end, and a new controller knows."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from controller_bench import Bench

from flm.cluster.control import reconcile
from flm.cluster.control.history import HISTORY
from flm.cluster.control.reconcile import GIVE_UP
from flm.cluster.state import read_json
from flm.worker.errors import BackendUnavailable, CheckpointError, RankFailed


def on_disk(bench: Bench) -> dict[str, Any]:
    """What the next controller will know. It is written after the controller's own memory."""
    return read_json(bench.folder / HISTORY) or {}


async def test_a_replica_that_fails_over_and_over_is_given_up_until_an_operator_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "retry_delay", lambda failures: 0.0)
    bench = Bench(tmp_path)
    bench.host.broken = RankFailed("another rank is gone")
    bench.start()
    await bench.until(lambda: [past["failures"] for past in on_disk(bench).values()] == [GIVE_UP] * 2)
    starts = len(bench.host.links)
    assert starts == 2 * 2 * GIVE_UP
    await bench.kill()
    bench.start()  # a new controller knows it too
    await bench.until(lambda: bench.phases() == {"m-0": "failed", "m-1": "failed"})
    await asyncio.sleep(0.7)
    assert len(bench.host.links) == starts
    group = bench.controller.groups["m-0"]
    assert "another rank is gone (failed 10 times in a row; given up" in group.message
    assert group.restarts == GIVE_UP - 1
    bench.host.broken = None
    await bench.controller.restart("m-0")
    await bench.until(lambda: bench.routed("m-0"))
    assert bench.controller.groups["m-0"].restarts == GIVE_UP
    assert bench.phases()["m-1"] == "failed"
    await bench.close()


async def test_what_trying_again_cannot_cure_is_given_up_after_one_more_try(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.host.broken = CheckpointError("weights.gguf", "truncated")
    bench.start()
    await bench.until(lambda: [past["failures"] for past in on_disk(bench).values()] == [GIVE_UP] * 2)
    assert len(bench.host.links) == 2 * 2 * 2, "two starts of two groups of two ranks"
    message = bench.controller.groups["m-0"].message
    assert (
        message.startswith("rank ")
        and "weights.gguf: truncated (failed for a reason that stays; given up" in message
    )
    assert bench.kinds().count("replica_failed") == 4
    await bench.kill()
    bench.start()  # a new controller knows it too
    await bench.until(lambda: bench.phases() == {"m-0": "failed", "m-1": "failed"})
    assert bench.controller.groups["m-0"].message == message
    bench.host.broken = None
    await bench.controller.scale("m", 2)  # an operator has put it right, and has both tried again
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    assert len(bench.host.links) == 2 * 2 * 3
    await bench.close()


async def test_a_node_that_cannot_serve_a_model_does_not_keep_it_from_others(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.host.names, bench.host.sound = ("n0", "n1"), "n1"
    bench.host.broken = BackendUnavailable("no NVIDIA driver is loaded")
    messages: set[str] = set()
    bench.start()

    def served() -> bool:
        messages.update(group.message for group in bench.controller.groups.values())
        return bench.routed("m-0", "m-1")

    await bench.until(served)
    assert {group.node_id for group in bench.controller.groups.values()} == {"n1"}
    assert messages == {""}, "`up` goes on waiting where another node is tried"
    assert any("no NVIDIA driver" in event.message for event in bench.controller.events._events)
    bench.host.leader("m-0").die()
    await bench.until(lambda: bench.routed("m-1"))
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    assert bench.controller.groups["m-0"].node_id == "n1", "what failed for good on a node is remembered"
    await bench.close()


async def test_a_new_controller_remembers_what_befell_a_replica(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.start()
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    bench.host.leader("m-0").die()
    await bench.until(lambda: bench.routed("m-1"))
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    await bench.kill()
    bench.start()
    await bench.until(lambda: bench.phases() == {"m-0": "ready", "m-1": "ready"})
    groups = bench.controller.groups
    assert (groups["m-0"].restarts, groups["m-0"].message) == (1, "rank 0: died")
    assert (groups["m-1"].restarts, groups["m-1"].message) == (0, "")
    await bench.controller.scale("m", 1)
    await bench.until(lambda: len(bench.controller.groups) == 1)
    (left,) = bench.controller.groups
    # what was stopped is forgotten, on disk a moment later
    await bench.until(lambda: on_disk(bench).keys() <= {left})
    await bench.close()
