"""ExpertOps in plain NumPy. Shape legend: see expert_ops.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.expert_ops import Routing
from flm.kernels.quant import QuantizedMatrix
from flm.kernels.reference_graph import ReferenceOps

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class ReferenceExperts:
    """Dequantised: gate over up [count, 2F, E] and down [count, E, F]."""

    gate_up: NDArray[np.float32]
    down: NDArray[np.float32]
    first: int
    nbytes: int

    @property
    def count(self) -> int:
        return len(self.down)

    @property
    def hidden(self) -> int:
        return int(self.down.shape[1])

    @property
    def width(self) -> int:
        return int(self.down.shape[2])


class ReferenceExpertOps(ReferenceOps):
    """See expert_ops.py."""

    merges_shared = False

    def pack_experts(
        self, experts: Iterable[tuple[QuantizedMatrix, QuantizedMatrix]], first: int = 0
    ) -> ReferenceExperts:
        pairs = list(experts)
        gate_up, down = (np.stack([pair[i].dequantize() for pair in pairs]) for i in (0, 1))
        return ReferenceExperts(gate_up, down, first, sum(m.nbytes for pair in pairs for m in pair))

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
        def call() -> None:
            scores_TN = _scores(logits_TN.astype(self.dtype), routing)
            choice_TN = scores_TN if bias_N is None else scores_TN + bias_N
            choice_TN = _within_groups(choice_TN, routing)
            ids = np.argsort(-choice_TN, axis=1, kind="stable")[:, : routing.top_k]
            weights = np.take_along_axis(scores_TN, ids, axis=1)
            if routing.normalize:
                weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
            real_T = np.ones(len(ids), bool) if seq_index_T is None else seq_index_T >= 0
            ids_TK[:, : routing.top_k] = np.where(real_T[:, None], ids, -1)
            weights_TK[:, : routing.top_k] = np.where(real_T[:, None], weights * routing.scale, 0)
            if counts_N is not None:
                counts_N[...] += np.bincount(ids[real_T].reshape(-1), minlength=routing.experts)

        self._do(call)

    def expert_mlp(
        self,
        x_TE: Array,
        experts: ReferenceExperts,
        ids_TK: Array,
        weights_TK: Array,
        out_TE: Array,
        accumulate: bool = False,
    ) -> None:
        def call() -> None:
            for t, (ids, weights) in enumerate(zip(ids_TK, weights_TK, strict=True)):
                x_E = x_TE[t].astype(self.dtype)
                total_E = out_TE[t].astype(self.dtype) if accumulate else np.zeros(len(x_E), self.dtype)
                for e, weight in zip(ids - experts.first, weights, strict=True):
                    if 0 <= e < experts.count:
                        gate_F, up_F = np.split(experts.gate_up[e].astype(self.dtype) @ x_E, 2)
                        act_F = gate_F / (1 + np.exp(np.minimum(-gate_F, 88))) * up_F
                        total_E += weight * (experts.down[e].astype(self.dtype) @ act_F)
                out_TE[t] = total_E

        self._do(call)

    def sigmoid_scale(self, gate_T1: Array, x_TE: Array) -> None:
        def call() -> None:
            x_TE[...] = x_TE / (1 + np.exp(np.minimum(-gate_T1.astype(self.dtype), 88)))

        self._do(call)


def _scores(logits_TN: Array, routing: Routing) -> Array:
    if routing.score == "sigmoid":
        return 1 / (1 + np.exp(np.minimum(-logits_TN, 88)))
    exp_TN = np.exp(logits_TN - logits_TN.max(axis=1, keepdims=True))
    return exp_TN / exp_TN.sum(axis=1, keepdims=True)


def _within_groups(choice_TN: Array, routing: Routing) -> Array:
    """-inf for the experts of groups that are not kept."""
    if routing.groups_kept == routing.groups:
        return choice_TN
    grouped = np.sort(choice_TN.reshape(len(choice_TN), routing.groups, -1), axis=2)[:, :, ::-1]
    worth_TG = grouped[:, :, :2].sum(axis=2) if routing.pair_score else grouped[:, :, 0]
    kept = np.argsort(-worth_TG, axis=1, kind="stable")[:, : routing.groups_kept]
    allowed_TG = np.zeros(worth_TG.shape, bool)
    np.put_along_axis(allowed_TG, kept, True, axis=1)
    return np.where(np.repeat(allowed_TG, routing.experts // routing.groups, axis=1), choice_TN, -np.inf)
