"""The controller over fake ranks that serve real heartbeats: it starts, notices, rebuilds, drains, adopts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from controller_bench import Bench

from flm.cluster.control import controller, reconcile
from flm.cluster.control.reconcile import MAX_SILENCE, Phase
from flm.cluster.state import Desired, load_desired
from flm.worker.errors import DoesNotFit, InvalidRequest, ModelNotFound, NotFound, RankFailed
from flm.worker.request import Request

GIB = 1 << 30


@pytest_asyncio.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    made.start()
    yield made
    await made.close()


async def test_replicas_come_up_and_the_gateway_learns_of_them(bench: Bench) -> None:
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    assert len(bench.host.living()) == 4
    assert {link.spec.threads for link in bench.host.living()} == {1}  # four ranks on four cores
    assert len({link.spec.run_dir for link in bench.host.living()}) == 2
    assert bench.kinds().count("replica_ready") == 2


async def test_replicas_answer_to_their_clusters_key_only(bench: Bench) -> None:
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    group = bench.controller.groups["m-0"]
    await bench.until(lambda: group.heartbeat is not None and not group.missed)
    group.key = "another cluster's"
    await bench.until(lambda: group.missed > 0)


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_ranks_death_rebuilds_its_group_and_no_other(bench: Bench, rank: int) -> None:
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    before = bench.host.living()
    victim = next(k for k in before if k.spec.replica_id == "m-0" and k.rank == rank)
    victim.die()
    noticed = await bench.until(lambda: bench.routed("m-1"))
    assert noticed < MAX_SILENCE - 1, "told of, not missed"
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    group = bench.controller.groups["m-0"]
    assert (group.restarts, group.message) == (1, f"rank {rank}: died")
    assert not [k for k in before if k.spec.replica_id == "m-0" and k.alive]
    assert [k for k in before if k.alive] == [k for k in before if k.spec.replica_id == "m-1"]


async def test_a_leader_that_makes_no_steps_is_seen_by_their_number(bench: Bench) -> None:
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    group, replica = bench.controller.groups["m-0"], bench.host.leader("m-0").served.replica

    def stuck() -> float:
        return group.view(time.monotonic()).stuck

    replica.hung = True
    await asyncio.sleep(1.2)
    assert stuck() == 0  # nothing to do
    replica.submit(Request("r", (1, 2)))
    await bench.until(lambda: stuck() > 0.8)
    replica.hung = False
    await bench.until(lambda: stuck() == 0)


async def test_a_long_step_is_a_fault_only_where_nobody_works_on_it(bench: Bench) -> None:
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    group, replica = bench.controller.groups["m-0"], bench.host.leader("m-0").served.replica
    replica.hung = replica.at_work = True
    replica.submit(Request("r", (1, 2)))
    replica.began = time.monotonic() - 50
    await bench.until(lambda: group.heartbeat is not None and group.heartbeat.step_age > 40)
    seen = group.stepped
    await bench.until(lambda: group.stepped > seen)  # a heartbeat later
    assert group.view(time.monotonic()).stuck < 0.1
    replica.at_work = False
    await bench.until(lambda: "replica_failed" in bench.kinds())
    assert "has not finished a step for 5" in group.message


async def test_a_leader_that_gives_up_says_whom_it_blames(bench: Bench) -> None:
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    bench.host.leader("m-1").served.replica.fail("rank 1 hung: missing in a collective for 10 s")
    await bench.until(lambda: "replica_failed" in bench.kinds())
    assert bench.controller.groups["m-1"].message == "rank 1 hung: missing in a collective for 10 s"


async def test_what_may_pass_is_retried_slowly_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "retry_delay", lambda failures: 0.0 if failures <= 1 else 3600.0)
    bench = Bench(tmp_path)
    bench.host.broken = RankFailed("another rank is gone")
    bench.start()
    await bench.until(lambda: [g.failures for g in bench.controller.groups.values()] == [2, 2])
    await asyncio.sleep(0.7)
    assert bench.controller.groups["m-0"].message.endswith("another rank is gone")
    assert len(bench.host.links) == 8, "two starts of two groups: at once, then after the delay"
    assert bench.gateway.routes["m"] == {}
    await bench.close()


async def test_a_slow_disk_holds_up_only_what_must_not_be_forgotten(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    writing, written = threading.Event(), threading.Event()

    def slow(folder: Path, desired: Desired) -> None:
        writing.set()
        assert written.wait(20)

    monkeypatch.setattr(controller, "save_desired", slow)
    scaling = asyncio.create_task(bench.controller.scale("m", 3))
    await bench.until(writing.is_set)
    assert bench.controller.desired.replicas == {"m": 2}
    written.set()
    assert await scaling == 2
    assert bench.controller.desired.replicas == {"m": 3}


async def test_scaling_up_and_down_leaves_nothing_behind(bench: Bench) -> None:
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    assert await bench.controller.scale("m", 3) == 2
    await bench.until(lambda: bench.routed("m-0", "m-1", "m-2"))
    assert await bench.controller.scale("m", 1) == 3
    await bench.until(lambda: len(bench.controller.groups) == 1 and len(bench.host.living()) == 2)
    assert bench.kinds().count("replica_draining") == 2
    saved = load_desired(bench.folder)
    assert saved is not None
    assert saved.replicas == {"m": 1}


@pytest.mark.parametrize(
    ("model", "replicas", "error", "said"),
    [
        ("x", 1, ModelNotFound, "served models: m"),
        ("m", 0, InvalidRequest, "expected 1 to 6, got 0"),
        ("m", 7, InvalidRequest, "expected 1 to 6, got 7"),
        ("m", -1, InvalidRequest, "expected 1 to 6, got -1"),
    ],
)
async def test_bad_scales_change_nothing(
    bench: Bench, model: str, replicas: int, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        await bench.controller.scale(model, replicas)
    assert bench.controller.desired == bench.desired


async def test_a_scale_that_does_not_fit_changes_nothing(bench: Bench) -> None:
    bench.host.memory = 5 * GIB
    with pytest.raises(DoesNotFit, match="needs 2 GiB of memory, 1 GiB are free"):
        await bench.controller.scale("m", 3)
    assert bench.controller.desired == bench.desired


async def test_a_new_controller_adopts_what_runs(bench: Bench) -> None:
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    await bench.controller.scale("m", 1)
    await bench.kill()  # in the middle of it
    before = bench.host.living()
    bench.start()
    await bench.until(lambda: len(bench.controller.groups) == 1 and len(bench.host.living()) == 2)
    assert set(bench.host.living()) < set(before)
    await bench.until(lambda: len(bench.gateway.routes["m"]) == 1)
    assert await bench.controller.scale("m", 2) == 1
    await bench.until(lambda: bench.routed("m-0", "m-1"))


async def test_a_new_controller_keeps_the_replica_that_serves_and_its_routes(bench: Bench) -> None:
    """Killed in the middle of a drain: the other replica is not the one to go, nor is it ever without a route."""
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    await bench.controller.drain("m-0")
    await bench.kill()
    serving = [link for link in bench.host.living() if link.spec.replica_id == "m-1"]
    pushed = len(bench.gateway.history)
    bench.start()
    await bench.until(lambda: bench.phases() == {"m-1": "ready"})
    assert all(link.alive for link in serving)
    assert all("m-1" in routes for routes in bench.gateway.history[pushed:])
    assert "replica_starting" not in bench.kinds()


async def test_a_group_that_lost_a_rank_without_a_controller_is_started_anew(bench: Bench) -> None:
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    await bench.kill()
    before = bench.host.living()
    next(k for k in before if k.spec.replica_id == "m-0" and k.rank == 1).die()
    bench.gateway.routes.clear()
    bench.start()
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    assert len(bench.host.living()) == 4
    assert {k.spec.replica_id for k in before if k.alive} == {"m-1"}


async def test_a_restarted_gateway_gets_its_routes_again_and_no_more_pushes_than_that(bench: Bench) -> None:
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    pushes = bench.gateway.pushes
    await asyncio.sleep(1.2)
    assert bench.gateway.pushes == pushes
    bench.gateway.restart()
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    assert bench.gateway.pushes == pushes + 1


async def test_drain_takes_that_replica_and_wants_one_less(bench: Bench) -> None:
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    await bench.controller.drain("m-0")
    assert bench.controller.groups["m-0"].phase is Phase.DRAINING
    await bench.until(lambda: bench.routed("m-1"))
    assert bench.controller.desired.replicas == {"m": 1}
    with pytest.raises(InvalidRequest, match="fewer than its minimum of 1"):
        await bench.controller.drain("m-1")
    with pytest.raises(NotFound, match="replica 'm-9' does not exist; replicas: m-"):
        await bench.controller.drain("m-9")


async def test_restart_replaces_a_replica_beside_it(bench: Bench) -> None:
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    await bench.controller.restart("m-0")
    await bench.until(lambda: bench.routed("m-1", "m-2"))
    assert bench.controller.desired.replicas == {"m": 2}


async def test_shutdown_leaves_no_rank_and_stops_the_gateway(bench: Bench) -> None:
    await bench.until(lambda: bench.routed("m-0", "m-1"))
    await asyncio.wait_for(bench.controller.shutdown(), 60.0)
    assert bench.host.living() == []
    assert bench.gateway.stopped
