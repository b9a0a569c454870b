"""A Ray cluster that others started: whether it is there, and what it has. Imports Ray only once it answers."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flm.cluster.hardware import Hardware, Machine
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
    # Ranks compute on CPUs: GPUs that Ray knows of are not counted.
    nodes = [Machine(node.name, node.cpus, node.memory) for node in actors.nodes_at(address)]
    return JoinedRay(address, Hardware(tuple(nodes), measured=True))


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
