"""A Ray cluster that others started: whether it is there, and what it has. Imports Ray only once it answers."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flm.cluster.control.placement import Node
from flm.cluster.settings.hardware import Hardware, Machine, known_gpu
from flm.kernels.cuda.inventory import installed
from flm.worker.errors import Unavailable

ANSWER_SECONDS = 3.0  # Ray's own attempts to connect go on for two minutes


@dataclass(frozen=True)
class JoinedRay:
    """`address` is host:port, also where the file says auto: what started there must be ended there."""

    address: str
    hardware: Hardware


def join_ray(address: str) -> JoinedRay:
    """The cluster at `address`, auto or host:port. Unavailable where none answers or this machine is no node of it."""
    if address != "auto":
        require_answer(address)
    from flm.cluster import actors

    if address == "auto":
        address = actors.auto_address()
        if not address:
            raise Unavailable("no Ray runs on this machine, and RAY_ADDRESS names none")
        require_answer(address)
    if not any(process.name() == "raylet" for process in psutil.process_iter(["name"])):
        raise Unavailable(
            f"this machine is no node of the Ray cluster at {address}; expected `ray start --address={address}` first"
        )
    machines = [machine_of(node, installed()) for node in actors.nodes_at(address)]
    return JoinedRay(address, Hardware(tuple(machines), measured=True))


def machine_of(node: Node, gpus_usable: bool) -> Machine:
    """gpus_usable: CuPy is installed, here and so on all nodes; where it is not, ranks compute on CPUs."""
    if not gpus_usable:
        return Machine(node.name, node.cpus, node.memory)
    return Machine(node.name, node.cpus, node.memory, gpus=node.gpus, gpu=known_gpu(node.gpu_kind))


def require_answer(address: str) -> None:
    """Unavailable unless a Ray head answers at host:port."""
    try:
        with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_SECONDS)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            why = "something else listens there"
        elif error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            why = f"no answer within {ANSWER_SECONDS:g} s"
        else:
            why = "it cannot be reached"
        raise Unavailable(f"no Ray cluster runs at {address}: {why}") from None


def answers(address: str) -> bool:
    try:
        require_answer(address)
    except Unavailable:
        return False
    return True
