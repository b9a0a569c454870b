"""`flm-cluster models`: what is supported, and how each was verified."""

from __future__ import annotations

import json
from typing import Annotated

import typer

INTRODUCTION = """# Supported models

Made by `flm-cluster models --markdown`; a test keeps it true. A checkpoint is a Hugging Face directory with safetensors, or
a GGUF file of the same architecture where there is one. Its config.json and its tensors decide how it is read, so other sizes
and fine-tuned models of an architecture are served alike.

- **golden logits**: a tiny checkpoint of that architecture gives the logits that its own code computes, within 2e-4 of the
  largest, on one, two and three ranks, with the prompt in one piece, in chunks and token by token.
- **formula**: the same against a decoder written from the formulas.
- **shapes**: config and tensor names were read; no logits were at hand.
- **refused**: the note says why.
"""


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/models.md.")] = False,
) -> None:
    """List the supported models and how each was verified."""
    from flm.worker.families.support import SUPPORT

    if markdown:
        print(to_markdown(), end="")
    elif as_json:
        keys = ("architecture", "models", "verified", "golden", "note")
        print(json.dumps([{key: getattr(row, key) for key in keys} for row in SUPPORT], indent=2))
    else:
        _print_table()


def to_markdown() -> str:
    """The text of docs/models.md."""
    from flm.worker.families.support import SUPPORT

    lines = [INTRODUCTION, "| model | architecture | verified | note |", "|---|---|---|---|"]
    for row in SUPPORT:
        lines += [f"| {name} | {row.architecture} | {row.verified} | {row.note} |" for name in row.models]
    return "\n".join(lines) + "\n"


def _print_table() -> None:
    from rich.console import Console
    from rich.table import Table

    from flm.worker.families.support import SUPPORT

    table = Table(box=None, pad_edge=False)
    for heading in ("model", "architecture", "verified", "note"):
        table.add_column(heading, overflow="fold")  # nothing is cut off, however narrow the terminal
    for row in SUPPORT:
        for name in row.models:
            table.add_row(name, row.architecture, row.verified, row.note)
    Console().print(table)
