"""The cores of this machine that this process may use."""

from __future__ import annotations

import os


def usable_cpus() -> int:
    """Those that the process is bound to, where the system can say so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
