"""Rows of RESULTS.md: each benchmark adds its own under its section's table, with the date and the hardware."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"


def hardware() -> str:
    """The processor, its usable cores, and the vector instructions that matter here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    vectors = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if flag in flags]
    return f"{len(os.sched_getaffinity(0))} cores, {named or platform.processor()} ({', '.join(vectors)})"


def with_row(text: str, section: str, row: str) -> str:
    """`text` with `row` as the last of the table under the heading `## section`; ValueError without such a table."""
    lines = text.splitlines()
    inside, last = False, None
    for i, line in enumerate(lines):
        if line.startswith("## "):
            inside = line == f"## {section}"
        elif inside and line.startswith("|"):
            last = i
    if last is None:
        raise ValueError(f"no table under a heading '## {section}'")
    return "\n".join([*lines[: last + 1], row, *lines[last + 1 :]]) + "\n"


def add_row(section: str, *cells: str) -> None:
    """Write `| date | hardware | cells… |` under `## section` of RESULTS.md."""
    row = f"| {' | '.join([time.strftime('%Y-%m-%d'), hardware(), *cells])} |"
    RESULTS.write_text(with_row(RESULTS.read_text("utf-8"), section, row), "utf-8")
