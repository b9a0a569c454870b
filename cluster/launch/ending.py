"""Draining and ending a cluster, whoever started it and whatever is left of it."""

from __future__ import annotations

import shutil
import time

from flm.cluster.client.admin_client import AdminClient
from flm.cluster.launch.joined_ray import answers, require_answer
from flm.cluster.launch.ray_head import RayHead, end_head, is_running
from flm.cluster.state import Endpoint, forget
from flm.worker.errors import Unavailable

STOP_SECONDS = 15.0  # for ranks to end once they have drained
PAUSE = 0.1  # seconds before a controller that died is asked again


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
    """Let all streams finish, at most `timeout` seconds, None: as long as their models' drain_timeout. A controller that
    dies meanwhile is asked again once it is back, for the time that is left. Unavailable where it does not answer."""
    longest = endpoint.drain_timeout if timeout is None else timeout
    until = time.monotonic() + longest + STOP_SECONDS
    while True:
        left = until - time.monotonic()
        try:
            with AdminClient(endpoint.admin, endpoint.admin_key) as client:
                return client.shutdown(timeout, left)
        except Unavailable:
            if time.monotonic() + PAUSE > until or why_gone(endpoint):
                raise
            time.sleep(PAUSE)
            if timeout is not None:
                timeout = max(until - STOP_SECONDS - time.monotonic(), 0.0)


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


def is_alive(endpoint: Endpoint) -> bool:
    """Whether a cluster still serves, or will again: a controller between two lives is waited for."""
    if why_gone(endpoint):
        return False
    if endpoint.head_session:
        return True
    try:
        with AdminClient(endpoint.admin, endpoint.admin_key) as client:
            return bool(client.status().name)
    except Unavailable:
        return False
