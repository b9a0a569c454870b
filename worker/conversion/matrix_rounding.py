"""The matrices of a checkpoint, rounded to int4 one after the other when their inputs are known.

Shape legend: T tokens of the text, K inputs, N outputs, E hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.quant import QuantizedMatrix
from flm.kernels.rounding import round_compensated
from flm.worker.checkpoints.checkpoint import Checkpoint
from flm.worker.config import Span
from flm.worker.conversion.inputs import Inputs
from flm.worker.conversion.rounded_source import RoundedSource
from flm.worker.tensors.precision import Precision, fuse

F32 = NDArray[np.float32]
LEAST_TOKENS = 64  # that an expert must have been chosen by; else it is rounded as if all tokens came to it
PARTS = ("gate_proj", "up_proj", "down_proj")


class MatrixRounding:
    """checkpoint: as it was given, with what has been rounded so far."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        precision: Precision,
        first_T: NDArray[np.bool_],
        on_progress: Callable[[float], None],
    ) -> None:
        """first_T: which tokens are the first of their text."""
        self._source = RoundedSource(checkpoint.source)
        self.checkpoint = replace(checkpoint, source=self._source)
        self._precision, self._first_T, self._on_progress = precision, first_T, on_progress
        self._shares = Counter(recipe.tensor for recipe in checkpoint.recipes.values())
        self._total = sum(len(shape) == 2 for shape in checkpoint.shapes.values())

    def linear(
        self, names: list[str], exact_TK: F32, rounded_TK: F32, behind_TN: F32 | None
    ) -> QuantizedMatrix:
        """The matrices of these names, one below the other, rounded for their common inputs. behind: see Inputs."""
        self._round(names, Inputs(exact_TK, rounded_TK, self._first_T, behind_TN))
        return fuse([self.checkpoint.matrix(name) for name in names])

    def expert(self, prefix: str, exact_TE: F32, rounded_TE: F32, rows: NDArray[np.int64]) -> F32:
        """The answers of an expert, once it is rounded, to the tokens of `rows`. An expert that shares a tensor of the checkpoint
        with others stays as it is."""
        names = [f"{prefix}{part}.weight" for part in PARTS]
        tensors = Counter(self.checkpoint.recipes[name].tensor for name in names)
        known = rows if len(rows) >= LEAST_TOKENS else np.arange(len(rounded_TE))
        exact, rounded, first = exact_TE[known], rounded_TE[known], self._first_T[known]
        alone = all(self._shares[tensor] == count for tensor, count in tensors.items())
        if alone:
            exact_act = _gated(exact, *(self._values(name) for name in names[:2]))
            self._round(names[:2], Inputs(exact, rounded, first))
        gate, up = (self._values(name) for name in names[:2])
        if alone:
            self._round(names[2:], Inputs(exact_act, _gated(rounded, gate, up), first))
        return _gated(rounded_TE[rows], gate, up) @ self._values(names[2]).T

    def _values(self, name: str) -> F32:
        return self.checkpoint.matrix(name).dequantize()

    def _round(self, names: list[str], inputs: Inputs) -> None:
        tensors = dict.fromkeys(self.checkpoint.recipes[name].tensor for name in names)
        wanted = [tensor for tensor in tensors if self._source.storage(tensor).format != "int4"]
        if wanted:
            shapes = [self._source.shape(tensor) for tensor in wanted]
            read = (
                self._source.matrix(t, Span(0, n), Span(0, k))
                for t, (n, k) in zip(wanted, shapes, strict=True)
            )
            values, moments = np.concatenate([matrix.dequantize() for matrix in read]), inputs.moments()
            group = self._precision.group_for(values.shape[1])
            together = round_compensated(inputs.target(values, moments), group, moments)
            ends = np.cumsum([n for n, _ in shapes]).tolist()
            for tensor, (n, _), end in zip(wanted, shapes, ends, strict=True):
                self._source.rounded[tensor] = together.slice_rows(end - n, end)
        done = sum(self._shares[tensor] for tensor in self._source.rounded)
        self._on_progress(min(done / self._total, 1.0))


def _gated(x_TK: F32, gate_NK: F32, up_NK: F32) -> F32:
    """silu(gate) * up."""
    gate_TN: Any = x_TK @ gate_NK.T
    return gate_TN / (1 + np.exp(-gate_TN.clip(-80, 80))) * (x_TK @ up_NK.T)
