"""The `flm-cluster` command. One module per command, registered here; modules import heavy things only inside
their functions, so that `flm-cluster --help` answers at once."""

from __future__ import annotations

import sys

import typer

from flm.cluster.cli import bench, chat, convert, down, events, generate, models, plan, replicas, status, up
from flm.worker.errors import FlmError

app = typer.Typer(
    name="flm-cluster",
    help="Serve open-weight language models from one laptop CPU to many GPU nodes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def root() -> None:
    """Serve open-weight language models from one laptop CPU to many GPU nodes."""


# In the order people meet them.
for command in (
    up.up,
    down.down,
    status.status,
    replicas.scale,
    replicas.drain,
    replicas.restart,
    events.events,
    plan.plan,
    models.models,
    convert.convert,
    generate.generate,
    chat.chat,
    bench.bench,
):
    app.command()(command)


def main() -> None:
    """Run the command line. A typed error is one clear message and exit code 1; usage errors exit with 2."""
    try:
        app()
    except FlmError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
