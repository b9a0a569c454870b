"""Everything that touches Ray: the head, the actors, and finding, starting and ending them. No token passes through it.

All actors are detached and named within the cluster's namespace: whoever started them may die. Ray restarts the
controller and the gateway, but never a rank, for a group lives and dies as one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, services
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flm.cluster.control.inventory import nodes_of, rank_resources
from flm.cluster.control.placement import Node
from flm.cluster.control.ranks import Adopted, RankEnd, RankReport
from flm.cluster.gateway.router import ReplicaRoute
from flm.cluster.replica.rank_process import RankProcess, sigkill
from flm.cluster.settings.config import is_loopback
from flm.cluster.state import ClusterSpec
from flm.cluster.wire.loop_thread import LoopThread
from flm.worker.errors import Unavailable
from flm.worker.group.rank import GroupSpec

log = logging.getLogger(__name__)

CONTROLLER, GATEWAY, RANK = "controller", "gateway", "rank"
OBJECT_STORE = 80_000_000  # bytes, about Ray's least; nothing of ours goes through it
START_SECONDS, ANSWER_SECONDS = 60.0, 5.0  # of a process that imports for seconds; of one that runs
KILL_GRACE = 0.5  # seconds for Ray's own way of killing before ours


def start_head(port: int, folder: str, cpus: int) -> None:
    """Start a Ray head on 127.0.0.1:`port` with its files below `folder`; returns once it runs, on its own.

    `ray start` would bring a dashboard, a log monitor and a client server along, a second of starting and 100 MB
    each; this starts Ray's node without them.
    """
    from ray._private.node import Node as RayNode
    from ray._private.parameter import RayParams

    class Head(RayNode):
        def start_api_server(self, **_: Any) -> None:
            self._webui_url = None

    params = RayParams(
        node_ip_address="127.0.0.1",
        gcs_server_port=port,
        temp_dir=folder,
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,
        num_cpus=cpus,
        object_store_memory=OBJECT_STORE,
    )
    Head(params, head=True, shutdown_at_exit=False, spawn_reaper=False)


def auto_address() -> str:
    """host:port of the Ray that RAY_ADDRESS names, or that runs here; "" where there is none."""
    try:
        return str(services.get_ray_address_from_environment("auto", None))
    except ConnectionError:
        return ""


@contextmanager
def connected(address: str, namespace: str) -> Iterator[None]:
    """A driver of a running Ray cluster, for a while. Unavailable where it cannot be joined."""
    handler = signal.getsignal(signal.SIGTERM)
    if is_loopback(address):
        ray_constants.ENABLE_RAY_CLUSTER = False  # else Ray looks for it at another address of this machine
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError) as error:
        why = error.__cause__ or error
        raise Unavailable(f"the Ray cluster at {address} cannot be joined: {why}") from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray takes it for itself, and keeps it after shutdown
    try:
        yield
    finally:
        ray.shutdown()


def start_cluster(address: str, spec: ClusterSpec) -> None:
    """Create the controller and the gateway, in parallel, on this node: their addresses are this machine's. They
    outlive this process. Unavailable where Ray cannot start them."""
    with connected(address, spec.namespace):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"max_restarts": -1, "scheduling_strategy": here}
        _named(GatewayActor, GATEWAY, **options).remote(spec)
        controller = _named(ControllerActor, CONTROLLER, max_task_retries=-1, **options).remote(spec)
        try:
            ray.get(controller.alive.remote(), timeout=START_SECONDS)
        except RayError as error:
            said = str(error).strip().splitlines()[-1]
            raise Unavailable(f"Ray at {address} did not start the controller: {said}") from None


def _named(actor: Any, name: str, **options: Any) -> Any:
    return actor.options(name=name, lifetime="detached", num_cpus=options.pop("num_cpus", 0), **options)


@ray.remote
class RankActor(RankProcess):
    """One rank."""

    def __init__(self, spec: GroupSpec, rank: int, key: str) -> None:
        super().__init__(spec, rank, ray.util.get_node_ip_address(), key)

    async def identity(self) -> tuple[GroupSpec, str]:
        return self.spec, ray.get_runtime_context().get_node_id()


@ray.remote
class GatewayActor:
    """The gateway. Serves on from its last routes while there is no controller."""

    def __init__(self, spec: ClusterSpec) -> None:
        from flm.cluster.gateway.gateway_process import GatewayProcess

        self._process = GatewayProcess(spec.desired)
        self._thread = LoopThread("gateway")
        self._thread.start(self._process.run())

    async def status(self) -> tuple[str, str]:
        return await self._thread.run(self._process.status())

    async def set_routes(self, model: str, routes: list[ReplicaRoute], wanted: int) -> None:
        await self._thread.run(self._process.set_routes(model, routes, wanted))

    async def stop(self, grace: float) -> None:
        await self._thread.run(self._process.stop(grace))


@ray.remote
class ControllerActor:
    """The controller with the Admin service."""

    def __init__(self, spec: ClusterSpec) -> None:
        from flm.cluster.control.controller_process import run_controller

        thread = LoopThread("controller")
        gateway = RayGateway(spec.namespace)
        thread.start(
            run_controller(spec.desired, Path(spec.folder), Path(spec.run_root), RayHost(spec), gateway)
        )

    async def alive(self) -> bool:
        return True


class RayRank:
    """A RankLink."""

    def __init__(self, rank: int, actor: Any) -> None:
        self.rank, self._actor = rank, actor
        self._end = actor.ended.remote()  # pending for as long as the rank lives: its death is an answer
        self._began = time.time()

    async def ended(self) -> RankEnd:
        try:
            end: RankEnd = await self._end
            return end
        except ActorDiedError:
            return RankEnd("died")
        except RayError as error:
            return RankEnd(f"was lost: {type(error).__name__}")

    async def report(self) -> RankReport:
        report: RankReport = await self._actor.report.remote()
        return report

    async def drain(self) -> None:
        await self._actor.drain.remote()

    async def stop(self) -> None:
        await self._actor.stop.remote()

    async def kill(self, report: RankReport) -> None:
        ray.kill(self._actor, no_restart=True)
        done, _ = await asyncio.wait({asyncio.ensure_future(self.ended())}, timeout=KILL_GRACE)
        if report.pid and report.node == os.uname().nodename:
            # A stopped process does not take Ray's hint, and Ray may call an actor dead before its process is.
            await asyncio.to_thread(sigkill, report.pid, time.time())
        elif not done:
            log.warning("rank %d may still run: Ray has not ended it yet", self.rank)


class RayHost:
    """A RankHost."""

    def __init__(self, spec: ClusterSpec) -> None:
        self._namespace, self._key = spec.namespace, spec.desired.replica_key

    async def nodes(self) -> list[Node]:
        return await asyncio.to_thread(ray_nodes)

    def launch(self, spec: GroupSpec, rank: int, node: Node) -> RayRank:
        options = {
            **rank_resources(spec.device),
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=False),
            "max_restarts": 0,
        }
        name = f"{RANK}/{Path(spec.run_dir).name}/{rank}"
        return RayRank(rank, _named(RankActor, name, **options).remote(spec, rank, self._key))

    async def adopt(self) -> list[Adopted]:
        names = await asyncio.to_thread(ray.util.list_named_actors)
        actors = [_find(name, self._namespace) for name in names if name.startswith(f"{RANK}/")]
        found: dict[str, Adopted] = {}
        for rank, actor in [pair for pair in actors if pair is not None]:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    spec, node_id = await actor.identity.remote()
            except (RayError, TimeoutError):
                ray.kill(actor, no_restart=True)  # its group is not whole without it, and ends too
                continue
            group = found.setdefault(spec.run_dir, Adopted(spec, node_id))
            group.links[rank] = RayRank(rank, actor)
        return list(found.values())


class RayGateway:
    """A GatewayLink."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._actor: Any = None

    async def incarnation(self) -> str:
        incarnation, failure = await self._call("status")
        if failure:
            raise Unavailable(failure)
        return str(incarnation)

    async def set_routes(self, model: str, routes: Sequence[ReplicaRoute], wanted: int) -> None:
        await self._call("set_routes", model, list(routes), wanted)

    async def stop(self, grace: float) -> None:
        await self._call("stop", grace)

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self._actor is None:
            self._actor = await asyncio.to_thread(ray.get_actor, GATEWAY, self._namespace)
        try:
            return await getattr(self._actor, method).remote(*arguments)
        except ActorUnavailableError:
            raise  # Ray is starting it again
        except ActorDiedError:
            self._actor = None
            raise


def ray_nodes() -> list[Node]:
    """The nodes that are alive and can hold ranks."""
    return nodes_of(ray.nodes())


def nodes_at(address: str) -> list[Node]:
    """The nodes of a running Ray cluster."""
    with connected(address, CONTROLLER):
        return ray_nodes()


def end_cluster(address: str, namespace: str) -> None:
    """End every actor of a cluster that joined the Ray cluster at `address`, the controller first: it starts others."""
    with connected(address, namespace):
        while names := ray.util.list_named_actors():
            for name in sorted(names, key=lambda name: name != CONTROLLER):
                with suppress(ValueError):  # it has ended since it was listed
                    ray.kill(ray.get_actor(name, namespace), no_restart=True)


def _find(name: str, namespace: str) -> tuple[int, Any] | None:
    try:
        return int(name.rpartition("/")[2]), ray.get_actor(name, namespace)
    except ValueError:  # it died since it was listed
        return None
