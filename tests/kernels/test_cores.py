"""How many cores there are to use."""

from __future__ import annotations

import os

import pytest

from flm.kernels.cores import usable_cpus


def test_only_cores_that_the_process_is_bound_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert usable_cpus() == 1
    monkeypatch.delattr(os, "sched_getaffinity")  # systems that cannot say
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus() == 1
