"""ExpertOps on CPUs: checks arguments, writes program rows; the work is in routing.py and experts.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.cpu.arrays import I32, address, check, columns, float_bits
from flm.kernels.cpu.emitter import SMALL, Emitter
from flm.kernels.cpu.layout import plan_words
from flm.kernels.cpu.matrix_table import LINE, MatrixTable, matrix_table
from flm.kernels.cpu.pack import pack
from flm.kernels.errors import ShapeError
from flm.kernels.expert_ops import Routing
from flm.kernels.quant import QuantizedMatrix

Array = NDArray[Any]
I64 = np.dtype(np.int64)


@dataclass(frozen=True, eq=False)
class CpuExperts:
    """matrices: gate over up, then down, of one expert after the other."""

    weights: MatrixTable
    first: int

    @property
    def count(self) -> int:
        return len(self.weights.matrices) // 2

    @property
    def hidden(self) -> int:
        return self.weights.matrices[1].shape[0]

    @property
    def width(self) -> int:
        return self.weights.matrices[1].shape[1]

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes


class ExpertCalls(Emitter):
    """See flm.kernels.expert_ops."""

    merges_shared = False  # their own steps are as fast

    def _load_expert_ops(self) -> None:
        self._load_ops("route", "routing", "experts")

    def pack_experts(
        self, experts: Iterable[tuple[QuantizedMatrix, QuantizedMatrix]], first: int = 0
    ) -> CpuExperts:
        self._load_expert_ops()
        matrices = [pack(matrix, self._arena.take) for pair in experts for matrix in pair]
        if not matrices:
            raise ShapeError("at least one expert expected, got none")
        hidden, width = matrices[1].shape
        for i, matrix in enumerate(matrices):
            want = (hidden, width) if i % 2 else (2 * width, hidden)
            if matrix.shape != want:
                raise ShapeError(f"expert {first + i // 2}: {want} expected, got {matrix.shape}")
        return CpuExperts(matrix_table(matrices, self._weight_leaves), first)

    def route(
        self,
        logits_TN: Array,
        routing: Routing,
        bias_N: Array | None,
        ids_TK: Array,
        weights_TK: Array,
        counts_N: Array | None = None,
        seq_index_T: Array | None = None,
    ) -> None:
        self._load_expert_ops()
        T, N, K, lead = len(logits_TN), routing.experts, routing.top_k, columns("ids", ids_TK)[1]
        if lead < K:
            raise ShapeError(f"ids of at least {K} columns expected, got {lead}")
        bias = 0 if bias_N is None else check("bias", bias_N, (N,))
        counts = 0 if counts_N is None else check("counts", counts_N, (N,), I64)
        area = -(-N * 20 // LINE) * LINE
        scratch = self._scratch(area * self.threads)
        row = [check("logits", logits_TN, (T, N)), T, N, K, int(routing.score == "sigmoid"), bias]
        row += [routing.groups, routing.groups_kept, int(routing.pair_score), int(routing.normalize)]
        row += [float_bits(routing.scale), check("ids", ids_TK, (T, lead), I32)]
        sequences = 0 if seq_index_T is None else check("seq_index", seq_index_T, (T,), I32)
        row += [check("weights", weights_TK, (T, lead)), counts, address(scratch), area, sequences, lead]
        keep = (logits_TN, bias_N, ids_TK, weights_TK, counts_N, seq_index_T, scratch)
        self._emit("route", row, *keep, workers=self._workers(T * N * (K + 8), SMALL))

    def expert_mlp(
        self,
        x_TE: Array,
        experts: CpuExperts,
        ids_TK: Array,
        weights_TK: Array,
        out_TE: Array,
        accumulate: bool = False,
    ) -> None:
        T, E, F, w = columns("x", x_TE)[0], experts.hidden, experts.width, experts.weights
        K = columns("ids", ids_TK)[1]
        x, ids = check("x", x_TE, (T, E)), check("ids", ids_TK, (T, K), I32)
        weights, out = check("weights", weights_TK, (T, K)), check("out", out_TE, (T, E))
        pairs, area = T * K, w.area(F * 4)
        sizes = [area * self.threads, plan_words(T, K, experts.count) * 8, pairs * w.inputs * 4]
        sizes += [pairs * w.sums * 4, pairs * max(2 * F, E) * 4]
        sizes = [-(-size // LINE) * LINE for size in sizes]
        scratch = self._scratch(sum(sizes))
        areas, plan, inputs, sums, results = (address(scratch) + sum(sizes[:i]) for i in range(5))
        row = [x, ids, T, E, K, experts.count, experts.first, F, address(w.table), weights, out]
        row += [int(accumulate), plan, inputs, sums, w.inputs, w.sums, areas, area]
        keep = (x_TE, experts, ids_TK, weights_TK, out_TE, scratch)
        up, down = [*row, 0, results], [*row, 1, results]
        gathers, products = self._workers(pairs * E, 2 * SMALL), self._workers(pairs * E * F, SMALL)
        self._emit("expert_sort", up, *keep)
        self._emit("expert_gather", up, *keep, workers=gathers)
        self._emit("expert_linear", up, *keep, workers=products)
        self._emit("expert_gather", down, *keep, workers=gathers)
        self._emit("expert_linear", down, *keep, workers=products)
        self._emit("expert_combine", down, *keep, workers=gathers)

    def sigmoid_scale(self, gate_T1: Array, x_TE: Array) -> None:
        self._load_expert_ops()
        T, E = columns("x", x_TE)
        gate, x, scratch = check("gate", gate_T1, (T, 1)), check("x", x_TE, (T, E)), self._scratch(T * 4)
        self._emit("sigmoid_scale", [gate, x, T, E, address(scratch)], gate_T1, x_TE, scratch)
