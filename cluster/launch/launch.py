"""From a checked cluster.yaml to a cluster that serves, step by step. Prints nothing: `up` does."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
import uuid

from flm.cluster.launch.checks import Checked
from flm.cluster.launch.ending import end_cluster
from flm.cluster.launch.joined_ray import JoinedRay, join_ray
from flm.cluster.launch.ray_head import ENVIRONMENT, RayHead
from flm.cluster.planning.plan import Plan
from flm.cluster.settings.yaml_source import error_at
from flm.cluster.state import ClusterSpec, Desired, Endpoint, save_endpoint, state_dir
from flm.cluster.wire.certificate import Tls
from flm.kernels.cores import usable_cpus
from flm.worker.errors import FlmError, Unavailable

# Waits for its word: an interrupt may come before whoever starts it knows that it runs. It ends then by itself.
_COMPILE = """
import sys
if sys.stdin.readline() == "go\\n":
    from flm.kernels.cpu.backend import warm
    warm(int(sys.argv[1]))
"""


def computes_on_cpus(plan: Plan) -> bool:
    """Whether any rank is to run on a CPU; those on GPUs compile what they need while they load."""
    return any(model.device == "cpu" for model in plan.models)


def needs_compiling() -> bool:
    """Whether the CPU kernels of this version are still to be compiled: half a minute, once."""
    from flm.kernels.cpu.configure import is_cached

    return not is_cached()


def compile_kernels() -> None:
    """Compile the CPU kernels into the cache, in a process of its own that ends with this call, however that ends.
    FlmError with what the compiler had to say."""
    child = subprocess.Popen(
        [sys.executable, "-c", _COMPILE, str(usable_cpus())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a terminal's Ctrl-C is this process' to act on
    )
    try:
        _, said = child.communicate(b"go\n")
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    if child.returncode:
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

    config, name, tls = checked.config, checked.config.name, checked.config.gateway.tls
    run_id = uuid.uuid4().hex[:8]
    replicas = {model.name: model.replicas.start for model in config.models}
    spec = ClusterSpec(
        name=name,
        namespace=f"flm-{name}-{run_id}",
        folder=str(state_dir(name) / run_id),
        run_root=f"{_shared_memory()}/flm-run-{run_id}",
        desired=Desired(checked.text, checked.file, replicas, plan.facts(), secrets.token_urlsafe(32)),
    )
    endpoint = Endpoint(
        name=name,
        gateway=config.gateway.listen,
        admin=config.admin.listen,
        gateway_key=next(iter(config.gateway.api_keys), ""),
        admin_key=next(iter(config.admin.api_keys), ""),
        ca_file=tls.cert_file if tls else "",
        server_name=Tls(tls.cert_file, tls.key_file).server_name() if tls else "",
        ray_address=head.address if head else address,
        namespace=spec.namespace,
        run_root=spec.run_root,
        head_session=head.session if head else 0,
        head_folder=head.folder if head else "",
        started=time.time(),
        drain_timeout=max(model.drain_timeout for model in config.models),
    )
    save_endpoint(endpoint)
    try:
        actors.start_cluster(endpoint.ray_address, spec)
    except BaseException:
        end_cluster(endpoint)
        raise
    return endpoint


def _shared_memory() -> str:
    """Where ranks exchange activations: in memory where the system has a file system for that."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
