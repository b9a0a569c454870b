"""Emitter: writes program rows, and runs them or records them. What every group of CPU ops stands on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.cpu.arena import Arena
from flm.kernels.cpu.configure import load_kernels, load_ops
from flm.kernels.cpu.graph import MISSING_COLUMN, CpuGraph, program_rows, raise_status
from flm.kernels.cpu.opcodes import WORKERS
from flm.kernels.cpu.pack import aligned
from flm.kernels.errors import KernelError

Array = NDArray[Any]
SMALL = 60_000  # elements, or products, below which starting threads costs more than it saves


class Emitter:
    """threads: how many ops may use. One thread at a time may call it."""

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        kernels = load_kernels(threads)
        self._run, self._ops, self._leaves = kernels.run, kernels.ops, kernels.leaves
        self._held = kernels.held
        self._graph: CpuGraph | None = None
        self._arena = Arena()
        self._row = program_rows(1)
        self._area = aligned((1 << 16,), np.uint8)

    @contextmanager
    def capture(self) -> Iterator[CpuGraph]:
        if self._graph is not None:
            raise KernelError("capture() inside capture()")
        self._graph = graph = CpuGraph(self._run)
        try:
            yield graph
        finally:
            self._graph = None

    def _emit(self, op: str, fields: list[int], *keep: Any, workers: int = 1) -> None:
        """Run a row or, while capturing, record it. keep: what the addresses point into, a collective's group last."""
        padding = [0] * (WORKERS - 1 - len(fields))
        row = [self._ops[op], *fields, *padding, workers]
        if self._graph is not None:
            self._graph.add(row, keep)
            return
        self._row[0, : len(row)] = row
        status = self._run(self._row)
        if status:
            raise_status(status & 255, int(self._row[0, MISSING_COLUMN]), keep[-1])

    def _load_ops(self, op: str, *modules: str) -> None:
        """Make the ops of these modules known, if `op`, one of them, is not yet: done while a model is built, since
        compiling takes seconds."""
        if op not in self._ops:
            self._ops.update(load_ops(*modules))

    def _workers(self, work: int, small: int) -> int:
        """All threads, but one for work that is sooner done than shared."""
        return self.threads if work >= small else 1

    def _scratch(self, nbytes: int) -> Array:
        """Working memory that ops share, since they run one after the other. Grows; graphs keep what they recorded."""
        if nbytes > len(self._area):
            self._area = aligned((nbytes + nbytes // 4,), np.uint8)
        return self._area

    def _weight_leaves(self, form: str) -> list[int]:
        """The products over one weight form: for a few tokens, to convert a tile, over tiles."""
        if form in ("int4", "int8", "fp8"):
            return [self._leaves[name] for name in (f"affine_{form}", f"convert_{form}", "affine_tile")]
        return [self._leaves[f"plain_{form}"], 0, 0]
