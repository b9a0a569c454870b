"""`flm-cluster up`: check, plan, start, watch it load, say where it is."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flm.cluster.cli.interrupts import Interrupts
from flm.worker.errors import FlmError, Unavailable

if TYPE_CHECKING:
    from rich.console import Console

    from flm.cluster.launch.checks import Checked
    from flm.cluster.state import Endpoint

LOOK = 2.0  # seconds between looks at a cluster that serves


def up(
    file: Annotated[Path, typer.Argument(help="The cluster.yaml.")],
    detach: Annotated[bool, typer.Option("--detach", help="Return once it serves.")] = False,
) -> None:
    """Serve what FILE describes. In the foreground, Ctrl-C drains and stops it."""
    from rich.console import Console

    from flm.cluster.cli.loading import await_ready
    from flm.cluster.launch.checks import check_file
    from flm.cluster.launch.ending import end_cluster
    from flm.cluster.state import load_endpoint

    console = Console(highlight=False)
    began = time.monotonic()
    with Interrupts() as interrupts:
        checked: Checked | None = None
        try:
            checked = check_file(file)
            endpoint = _start(checked, console)
            await_ready(endpoint, console, interrupts)
            interrupts.raising = False
        except BaseException as error:
            interrupts.raising = False  # nothing may cut the clearing up short
            begun = load_endpoint(checked.config.name) if checked is not None else None
            if begun is not None:
                end_cluster(begun)
            if not isinstance(
                error, KeyboardInterrupt | SystemExit
            ):  # Ray's own answer to SIGTERM is to exit
                raise
            console.print("Interrupted; nothing is left running.")
            raise typer.Exit(130) from None
        _say_where(endpoint, console, time.monotonic() - began, detach)
        if not detach:
            _stay(endpoint, console, interrupts)


def _start(checked: Checked, console: Console) -> Endpoint:
    """Ray imports while the plan is made, and starts once the plan fits."""
    from flm.cluster.launch import launch
    from flm.cluster.launch.checks import check_plan
    from flm.cluster.launch.ray_head import StartingHead
    from flm.cluster.settings.yaml_source import lines_of

    head = StartingHead() if checked.config.ray.address == "local" else None
    try:
        joined = launch.join(checked) if head is None else None
        with lines_of(checked.text, checked.file):
            plan = check_plan(checked.config, joined.hardware if joined else None)
        console.print(plan.table())
        plan.require_servable()
        if head is not None:
            head.go()
        if launch.computes_on_cpus(plan) and launch.needs_compiling():
            with console.status("Compiling the CPU kernels: up to a minute, once per machine and version"):
                launch.compile_kernels()
        with console.status("Starting Ray"):
            running = head.wait() if head is not None else None
            return launch.start_cluster(checked, plan, joined.address if joined else "", running)
    except BaseException:
        if head is not None:
            head.stop()
        raise


def _say_where(endpoint: Endpoint, console: Console, seconds: float, detach: bool) -> None:
    console.print(f"[bold green]{endpoint.name} serves[/] after {seconds:.1f} s")
    console.print(f"  gateway  {endpoint.gateway}  (gRPC flm.v1.Inference, reflection, health)")
    console.print(f"  admin    {endpoint.admin}  (gRPC flm.v1.Admin)")
    console.print("Next: flm-cluster chat · flm-cluster status · flm-cluster scale MODEL N · ", end="")
    console.print("flm-cluster down" if detach else "Ctrl-C to drain and stop")


def _stay(endpoint: Endpoint, console: Console, interrupts: Interrupts) -> None:
    """Show events until interrupted, then drain and stop. A second interrupt does not wait for the drain."""
    from flm.cluster.cli.events import follow
    from flm.cluster.launch.ending import drain_cluster, end_cluster

    def show(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    threading.Thread(target=follow, args=(endpoint, show), daemon=True).start()
    if not _until_interrupted(endpoint, interrupts):
        console.print("Stopped by `flm-cluster down`.")
        return
    console.print("Draining; Ctrl-C again stops at once.")
    ended: list[str] = []  # why it did not drain, "" where it did

    def drain() -> None:
        try:
            drain_cluster(endpoint, None)
            ended.append("")
        except FlmError as error:
            ended.append(str(error))
        finally:
            interrupts.wake()

    threading.Thread(target=drain, daemon=True).start()
    interrupts.wait()
    if why := ended[0] if ended else "interrupted":
        console.print(f"Not drained: {why}", markup=False)
    end_cluster(endpoint)
    console.print("Stopped.")


def _until_interrupted(endpoint: Endpoint, interrupts: Interrupts) -> bool:
    """Wait; False where the cluster was ended in order meanwhile, Unavailable where its processes went by themselves."""
    from flm.cluster.launch.ending import end_cluster, why_gone
    from flm.cluster.state import load_endpoint

    gone = ""
    while not interrupts.wait(LOOK):
        if load_endpoint(endpoint.name) != endpoint:  # another may have taken its name by now
            return False
        if gone:  # since the last look: `down` would have tidied up after it
            end_cluster(endpoint)
            raise Unavailable(f"cluster {endpoint.name!r} has ended: {gone}")
        gone = why_gone(endpoint)
    return True
