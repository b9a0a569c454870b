"""`flm-cluster plan`: what a file needs, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def plan(
    file: Annotated[Path, typer.Argument(help="The cluster.yaml.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Estimate memory, KV tokens, concurrency and speed per rank; exit with 1 where it cannot fit."""
    from rich.console import Console

    from flm.cluster.planning.plan import plan_cluster
    from flm.cluster.settings.config import load_config
    from flm.cluster.settings.yaml_source import lines_of

    config = load_config(file)
    with lines_of(file.read_text(encoding="utf-8"), str(file)):
        made = plan_cluster(config)
    if as_json:
        print(json.dumps(made.to_json(), indent=2))
    else:
        console = Console()
        console.print(made.table())
        for problem in made.problems:
            console.print(f"does not fit: {problem}", style="red", highlight=False, soft_wrap=True)
        for obstacle in made.obstacles:
            console.print(f"up would stop: {obstacle}", style="yellow", highlight=False, soft_wrap=True)
        if made.fits:
            console.print("It fits that hardware.", style="green")
    if not made.fits:
        raise typer.Exit(1)
