"""From a cluster.yaml to a cluster that serves, step by step, and back. Prints nothing: `up` and `down` do."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flm.cluster.admin_client import AdminClient
from flm.cluster.config import ClusterConfig, load_config, unserved
from flm.cluster.hardware import Hardware, measure_hardware
from flm.cluster.joined_ray import JoinedRay, answers, join_ray, require_answer
from flm.cluster.plan import Plan, plan_cluster
from flm.cluster.ray_head import ENVIRONMENT, RayHead, end_head, is_running, usable_cpus
from flm.cluster.state import (
    ClusterSpec,
    Desired,
    Endpoint,
    ModelFacts,
    forget,
    load_endpoint,
    save_endpoint,
    state_dir,
)
from flm.cluster.yaml_source import YamlPath, error_at
from flm.worker.errors import FlmError, Unavailable

STOP_SECONDS = 15.0  # for ranks to end once they have drained


@dataclass(frozen=True)
class Checked:
    """A file that may be started."""

    config: ClusterConfig
    file: str
    text: str


def check_file(file: Path) -> Checked:
    """Everything that can be known without reading a checkpoint. ConfigError; nothing has been started."""
    config = load_config(file)
    text = file.read_text(encoding="utf-8")
    running = load_endpoint(config.name)
    if running is not None and not _alive(running):
        end_cluster(running)  # left over from a crash or a reboot
        running = None
    for path, message in _obstacles(config, running):
        raise error_at(text, str(file), path, message)
    return Checked(config, str(file.absolute()), text)


def _obstacles(config: ClusterConfig, running: Endpoint | None) -> Iterator[tuple[YamlPath, str]]:
    """Why this file cannot be started here and now: where, and what was expected."""
    if running is not None:
        message = f"cluster {config.name!r} runs already; expected another name, or `flm-cluster down` first"
        yield ("name",), message
    yield from unserved(config)
    cpus = usable_cpus()
    for index, model in enumerate(config.models):
        if config.ray.address == "local" and model.tensor_parallel > cpus:
            message = f"{model.tensor_parallel} ranks are larger than the machine; expected at most its {cpus} cores"
            yield ("models", index, "tensor_parallel"), message
    if config.gateway.tls is not None:
        for key, path in config.gateway.tls:
            if not os.access(path, os.R_OK):
                yield ("gateway", "tls", key), f"cannot read {path}; expected a PEM file"
    for section, listen in (("gateway", config.gateway.listen), ("admin", config.admin.listen)):
        reason = why_taken(listen)
        if reason:
            yield (section, "listen"), f"cannot listen on {listen}: {reason}; expected a free port"


def why_taken(listen: str) -> str:
    """Why host:port cannot be bound now, or ""."""
    host, _, port = listen.rpartition(":")
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        return "the port is taken by another program" if taken else str(error.strerror)
    return ""


def check_plan(config: ClusterConfig, hardware: Hardware | None = None) -> Plan:
    """The plan on the hardware there is. CheckpointError, ConfigError; whether it fits is the plan's to say."""
    return plan_cluster(config, hardware or measure_hardware())


def facts_of(plan: Plan) -> dict[str, ModelFacts]:
    return {
        model.name: ModelFacts(
            rank_memory=max((rank.total_bytes for rank in model.ranks), default=0),
            max_context=model.max_context,
            architecture=model.architecture,
            precision=model.precision,
        )
        for model in plan.models
    }


def start_warming() -> subprocess.Popen[bytes] | None:
    """Compile the CPU kernels in a process of their own; None where the cache has them."""
    from flm.kernels.cpu.configure import is_cached

    if is_cached():
        return None
    code = "import sys; from flm.kernels.cpu.backend import warm; warm(int(sys.argv[1]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(usable_cpus())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish_warming(warming: subprocess.Popen[bytes]) -> None:
    """FlmError with what the compiler, or OpenMP's absence, had to say."""
    try:
        _, said = warming.communicate()
    except BaseException:
        warming.kill()
        warming.wait()
        raise
    if warming.returncode:
        lines = said.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        kind, _, message = lines[-1].partition(": ")
        raise FlmError(f"the CPU kernels cannot be compiled: {message or kind}")


def join(checked: Checked) -> JoinedRay:
    """The running Ray cluster that the file names. ConfigError where it cannot be joined."""
    try:
        return join_ray(checked.config.ray.address)
    except Unavailable as error:
        message = f"{error}; expected auto or the host:port of one that runs, or local for a Ray of its own"
        raise error_at(checked.text, checked.file, ("ray", "address"), message) from None


def start_cluster(checked: Checked, plan: Plan, address: str, head: RayHead | None) -> Endpoint:
    """Create the controller and the gateway on our own `head`, or on the Ray cluster at `address`. From now on
    `end_cluster` undoes it."""
    if head is not None:
        os.environ |= ENVIRONMENT  # Ray reads it when it is imported
    from flm.cluster import actors

    config, name = checked.config, checked.config.name
    run_id = uuid.uuid4().hex[:8]
    replicas = {model.name: model.replicas.start for model in config.models}
    spec = ClusterSpec(
        name=name,
        namespace=f"flm-{name}-{run_id}",
        folder=str(state_dir(name) / run_id),
        run_root=f"{_shared_memory()}/flm-run-{run_id}",
        desired=Desired(checked.text, checked.file, replicas, facts_of(plan), secrets.token_urlsafe(32)),
    )
    endpoint = Endpoint(
        name=name,
        gateway=config.gateway.listen,
        admin=config.admin.listen,
        gateway_key=next(iter(config.gateway.api_keys), ""),
        admin_key=next(iter(config.admin.api_keys), ""),
        ca_file=config.gateway.tls.cert_file if config.gateway.tls else "",
        ray_address=head.address if head else address,
        namespace=spec.namespace,
        run_root=spec.run_root,
        head_session=head.session if head else 0,
        head_folder=head.folder if head else "",
        started=time.time(),
    )
    save_endpoint(endpoint)
    try:
        actors.start_cluster(endpoint.ray_address, spec)
    except BaseException:
        end_cluster(endpoint)
        raise
    return endpoint


def end_cluster(endpoint: Endpoint) -> None:
    """End every process of a cluster, whatever state it is in, and forget it."""
    head = head_of(endpoint)
    if head is not None:
        end_head(head)
    elif endpoint.ray_address and answers(endpoint.ray_address):  # else its processes went with their Ray
        from flm.cluster import actors

        actors.end_cluster(endpoint.ray_address, endpoint.namespace)
    if endpoint.run_root:
        shutil.rmtree(endpoint.run_root, ignore_errors=True)
    forget(endpoint.name)


def drain_cluster(endpoint: Endpoint, timeout: float | None) -> None:
    """Let all streams finish, at most `timeout` seconds, None: as long as their models' drain_timeout. Unavailable where the controller does not answer."""
    with AdminClient(endpoint.admin, endpoint.admin_key) as client:
        client.shutdown(timeout, None if timeout is None else timeout + STOP_SECONDS)


def head_of(endpoint: Endpoint) -> RayHead | None:
    if not endpoint.head_session:
        return None
    return RayHead(endpoint.ray_address, endpoint.head_folder, endpoint.head_session)


def why_gone(endpoint: Endpoint) -> str:
    """Why nothing of a cluster can be running any more, or ""."""
    head = head_of(endpoint)
    if head is not None:
        return "" if is_running(head) else "its processes are gone"
    try:
        require_answer(endpoint.ray_address)
    except Unavailable as error:
        return str(error)
    return ""


def _alive(endpoint: Endpoint) -> bool:
    if why_gone(endpoint):
        return False
    if endpoint.head_session:
        return True
    try:
        with AdminClient(endpoint.admin, endpoint.admin_key) as client:
            return bool(client.status().name)
    except Unavailable:
        return False


def _shared_memory() -> str:
    """Where ranks exchange activations: in memory where the system has a file system for that."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
