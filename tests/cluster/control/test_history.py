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


def on_disk(bench: Bench) -> dict[str, Any]:
    """What the next controller will know. It is written after the controller's own memory."""
    return read_json(bench.folder / HISTORY) or {}


async def test_a_replica_that_fails_over_and_over_is_given_up_until_an_operator_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "retry_delay", lambda failures: 0.0)
    bench = Bench(tmp_path)
    bench.host.broken = True
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
    assert "weights.gguf: truncated (failed 10 times in a row; given up" in group.message
    assert group.restarts == GIVE_UP - 1
    bench.host.broken = False
    await bench.controller.restart("m-0")
    await bench.until(lambda: bench.routed("m-0"))
    assert bench.controller.groups["m-0"].restarts == GIVE_UP
    assert bench.phases()["m-1"] == "failed"
    await bench.kill()


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
    await bench.kill()
