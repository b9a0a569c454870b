"""`flm-cluster convert`: a checkpoint in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A directory with config.json and weights, or with a LoRA adapter."
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The directory to write; it must not exist.")],
    quantization: Annotated[
        str, typer.Option(help="As in cluster.yaml: auto, int8, int4, int4:group=128, bf16, fp16 or fp32.")
    ] = "auto",
    tensor_parallel: Annotated[
        int,
        typer.Option(
            min=0, max=1024, help="Cut for this many ranks: one file each. 0: any number can load it."
        ),
    ] = 0,
    expert_parallel: Annotated[
        bool,
        typer.Option("--expert-parallel", help="With --tensor-parallel: spread experts over ranks whole."),
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Run the model first, for a better rounding to int4.")
    ] = False,
) -> None:
    """Write a checkpoint that loads without work: quantised, or cut for its ranks. Reads PyTorch's .bin files safely."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from flm.worker.conversion.adapter import resolve_source
    from flm.worker.conversion.convert import convert as run

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(f"Converting to {target}", total=1.0)
        report = lambda fraction: bars.update(task, completed=fraction)
        run(
            resolve_source(source),
            target,
            quantization,
            tensor_parallel,
            report,
            expert_parallel,
            calibrate,
        )
    size = sum(path.stat().st_size for path in target.iterdir())
    console.print(f"{target}: {size / 1e9:.2f} GB. Serve it with `path: {target.resolve()}`.", soft_wrap=True)
