"""What outlives processes: the desired state of a cluster, and where a running one is to be found.

Files lie in $XDG_STATE_HOME/flm-cluster/<name>/ (default ~/.local/state) and are replaced whole: a reader sees the old
or the new content, whenever the writer or the machine stops.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flm.worker.errors import ConfigError, InvalidRequest, NotFound

DESIRED, ENDPOINT, STARTS = "desired.json", "endpoint.json", "starts.json"


@dataclass(frozen=True)
class ModelFacts:
    """What the plan learnt of a model's checkpoint."""

    rank_memory: int  # bytes of the largest rank
    max_context: int  # tokens
    architecture: str = ""
    precision: str = ""
    device: str = "cpu"  # cpu or cuda, of every rank
    rows: int = 0  # of its embedding
    eos_token_ids: tuple[int, ...] = ()
    planned: tuple[int, int, int] = (0, 0, 0)  # bytes of a rank's weights, KV cache, and all else


@dataclass(frozen=True)
class Desired:
    """What should run: the text of cluster.yaml, and the replicas wanted of each model now. `replica_key` is this
    cluster's secret between gateway, controller and ranks; never printed, and saved for its owner only."""

    text: str
    file: str  # where the text came from; relative paths start there
    replicas: Mapping[str, int]
    facts: Mapping[str, ModelFacts]
    replica_key: str = field(repr=False)

    def scaled(self, model: str, replicas: int) -> Desired:
        return replace(self, replicas={**self.replicas, model: replicas})


@dataclass(frozen=True)
class ClusterSpec:
    """What the controller and the gateway are started with, and started again by Ray."""

    name: str
    namespace: str
    folder: str  # of the controller's state
    run_root: str  # ranks keep sockets and shared memory below it, each on its node
    desired: Desired


@dataclass(frozen=True)
class Endpoint:
    """How to reach a running cluster, and what `down` has to end. Readable by its owner only: it holds keys."""

    name: str
    gateway: str  # host:port
    admin: str
    gateway_key: str = ""
    admin_key: str = ""
    ca_file: str = ""  # PEM of the gateway's certificate where it speaks TLS
    server_name: str = ""  # that the certificate is for
    ray_address: str = ""
    namespace: str = ""  # of the cluster's actors in Ray
    run_root: str = ""
    head_session: int = 0  # process session of our own Ray head; 0 where the cluster joined another
    head_folder: str = ""
    started: float = 0.0  # seconds since the epoch
    drain_timeout: float = 0.0  # seconds, the longest of its models


def state_root() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "flm-cluster"


def state_dir(name: str) -> Path:
    return state_root() / name


def write_atomic(path: Path, data: Mapping[str, Any]) -> None:
    """Replace a JSON file as a whole, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def read_json(path: Path) -> dict[str, Any] | None:
    """What write_atomic wrote, None where nothing was written yet."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return data


def save_desired(folder: Path, desired: Desired) -> None:
    write_atomic(folder / DESIRED, asdict(desired))


def load_desired(folder: Path) -> Desired | None:
    """The saved state, or None where nothing was saved yet."""
    data = read_json(folder / DESIRED)
    if data is None:
        return None
    facts = {
        name: ModelFacts(**{**fields, **{key: tuple(fields[key]) for key in ("eos_token_ids", "planned")}})
        for name, fields in data.pop("facts").items()
    }
    return Desired(**data, facts=facts)


def count_start(folder: Path) -> tuple[int, float]:
    """To be called when a controller starts: how many started before it, and when the first did (seconds since the
    epoch)."""
    saved = read_json(folder / STARTS) or {"count": 0, "first": time.time()}
    write_atomic(folder / STARTS, {**saved, "count": saved["count"] + 1})
    return saved["count"], saved["first"]


def save_endpoint(endpoint: Endpoint) -> None:
    """ConfigError where it cannot be kept."""
    folder = state_dir(endpoint.name)
    try:
        write_atomic(folder / ENDPOINT, asdict(endpoint))
    except OSError as error:
        message = f"the cluster's state cannot be kept in {folder}: {error.strerror}; expected a folder that can be written"
        raise ConfigError(f"{message}, below XDG_STATE_HOME or ~/.local/state") from error


def forget(name: str) -> None:
    """Remove all that is kept of a cluster."""
    shutil.rmtree(state_dir(name), ignore_errors=True)


def running_clusters() -> list[str]:
    """Names of the clusters that have an endpoint file, whether they still answer or not."""
    return sorted(path.parent.name for path in state_root().glob(f"*/{ENDPOINT}"))


def load_endpoint(name: str) -> Endpoint | None:
    data = read_json(state_dir(name) / ENDPOINT)
    return None if data is None else Endpoint(**data)


def find_endpoint(name: str = "") -> Endpoint:
    """The named cluster, or the only one. NotFound where there is none, InvalidRequest where it is not clear which."""
    names = running_clusters()
    if not name and len(names) > 1:
        raise InvalidRequest("--cluster", f"expected one of {', '.join(names)}: several clusters are running")
    endpoint = load_endpoint(name or (names[0] if names else ""))
    if endpoint is None:
        known = f"; running: {', '.join(names)}" if names else ""
        wanted = f"cluster {name!r} is not running here" if name else "no cluster is running here"
        raise NotFound(f"{wanted}{known}; start one with `flm-cluster up FILE`")
    return endpoint
