"""The controller's life inside its process: the loop and the Admin service beside it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from flm.cluster.control.admin import serve_admin
from flm.cluster.control.controller import Controller
from flm.cluster.control.ranks import GatewayLink, RankHost
from flm.cluster.state import Desired, count_start


async def run_controller(
    desired: Desired, folder: Path, run_root: Path, host: RankHost, gateway: GatewayLink
) -> None:
    """Look after the cluster for as long as the process lives."""
    restarts, first = count_start(folder)
    controller = Controller(folder, desired, host, gateway, run_root)
    if restarts:
        controller.events.add("controller_restarted", f"start {restarts + 1}")
    await controller.adopt()  # before anyone can ask: until then there seem to be no replicas
    server = asyncio.create_task(serve_admin(controller, restarts, first))
    await asyncio.gather(server, controller.run())
