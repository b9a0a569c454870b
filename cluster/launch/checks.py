"""What `up` finds out before it starts anything: what is wrong with a file here and now, and whether it can be served."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flm.cluster.gateway.served_model import ServedModel, read_words, served_model
from flm.cluster.launch.ending import end_cluster, is_alive
from flm.cluster.planning.plan import Plan, plan_cluster
from flm.cluster.settings.config import ClusterConfig, load_config
from flm.cluster.settings.hardware import Hardware, measure_hardware
from flm.cluster.settings.yaml_source import YamlPath, error_at
from flm.cluster.state import Endpoint, load_endpoint, running_clusters
from flm.cluster.wire.certificate import Tls
from flm.kernels.cores import usable_cpus
from flm.kernels.cuda.inventory import visible_gpus
from flm.kernels.errors import OpenMPMissing
from flm.kernels.openmp import require_openmp
from flm.worker.errors import BackendUnavailable, CheckpointError, ConfigError


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
    if running is not None and not is_alive(running):
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
    for index, model in enumerate(config.models):
        if config.ray.address == "local" and (most := _most_ranks(model.device, model.tensor_parallel)):
            message = (
                f"{model.tensor_parallel} ranks are larger than the machine; expected at most its {most}"
            )
            yield ("models", index, "tensor_parallel"), message
    if config.gateway.tls is not None:
        try:
            Tls(config.gateway.tls.cert_file, config.gateway.tls.key_file).server_name()
        except ConfigError as error:
            yield ("gateway", *error.field.split(".")), error.message
    for section, listen in (("gateway", config.gateway.listen), ("admin", config.admin.listen)):
        reason = _own_cluster_at(listen) or why_taken(listen)
        if reason:
            yield (section, "listen"), f"cannot listen on {listen}: {reason}; expected a free port"


def _most_ranks(device: str, wanted: int) -> str:
    """How many ranks of one replica this machine can hold, as "2 cores"; "" where that is enough. Where only GPUs will
    do, the plan says what is missing of them."""
    cpus = usable_cpus()
    if wanted <= cpus or device == "cuda":
        return ""
    gpus = len(visible_gpus()) if device == "auto" else 0
    if wanted <= gpus:
        return ""
    return f"{gpus} GPUs" if gpus > cpus else f"{cpus} cores"


def _own_cluster_at(listen: str) -> str:
    """That a running cluster of ours has the port, or ""."""
    for endpoint in filter(None, map(load_endpoint, running_clusters())):
        if listen in (endpoint.gateway, endpoint.admin) and is_alive(endpoint):
            return f"cluster {endpoint.name!r} has it, until `flm-cluster down --cluster {endpoint.name}`"
    return ""


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
    """The plan on the hardware there is; whether it fits is the plan's to say. ConfigError (of a checkpoint too),
    BackendUnavailable where the gateway or a rank would fail on this machine."""
    _check_kernels(config)
    plan = plan_cluster(config, hardware or measure_hardware())
    if plan.fits and not plan.obstacles:
        facts = plan.facts()
        for index, model in enumerate(config.models):
            _check_words(index, served_model(model, facts[model.name]))
    return plan


def _check_words(index: int, model: ServedModel) -> None:
    """The gateway's part of a model, which would otherwise be the one to stumble."""
    try:
        read_words(model)
    except ConfigError as error:
        raise ConfigError(error.message, field=f"models[{index}]") from error
    except CheckpointError as error:
        raise ConfigError(str(error), field=f"models[{index}].path") from error


def _check_kernels(config: ClusterConfig) -> None:
    if all(model.device == "cuda" for model in config.models):
        return
    try:
        require_openmp()
    except OpenMPMissing as error:
        raise BackendUnavailable(str(error)) from None
