"""ExpertOps: what a backend needs beside `Backend` to run mixtures of experts. A backend without them cannot serve such models.

Shape legend: T tokens, E hidden, N experts of the layer, K experts chosen per token, F width of an expert on this rank.
What backend.py says of every op holds here too: a token's result depends on that token's row alone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from flm.kernels.errors import ShapeError
from flm.kernels.quant import QuantizedMatrix

Array = Any


@dataclass(frozen=True)
class Routing:
    """How a token's experts are chosen from the router's logits.

    score: "softmax" over all experts, or "sigmoid" of each (DeepSeek-V3, arXiv:2412.19437).
    groups, groups_kept: experts form equal groups of neighbours, and only those of the best groups may be chosen (device-
        limited routing of DeepSeek-V2, arXiv:2405.04434). A group is worth its best expert, or, where `pair_score`, the
        sum of its two best. Equal values: the lowest number wins, among groups as among experts.
    normalize: the chosen experts' scores are divided by their sum.  scale: and multiplied by this.
    """

    experts: int
    top_k: int
    score: str = "softmax"
    groups: int = 1
    groups_kept: int = 1
    pair_score: bool = False
    normalize: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.score not in ("softmax", "sigmoid"):
            raise ShapeError(f"score: softmax or sigmoid expected, got {self.score!r}")
        if self.groups < 1 or self.experts % self.groups:
            raise ShapeError(f"{self.experts} experts cannot form {self.groups} equal groups")
        if not 1 <= self.groups_kept <= self.groups:
            raise ShapeError(f"between 1 and {self.groups} groups to keep expected, got {self.groups_kept}")
        if not 1 <= self.top_k <= self.groups_kept * (self.experts // self.groups):
            raise ShapeError(
                f"at most {self.groups_kept * (self.experts // self.groups)} experts per token (those of the groups "
                f"kept) expected, got {self.top_k}"
            )
        if self.pair_score and self.experts // self.groups < 2:
            raise ShapeError("groups of at least two experts expected where a group's score is a sum of two")


class PackedExperts(Protocol):
    """The experts of one layer that a rank holds: those from `first` on, `count` of them."""

    @property
    def first(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


@runtime_checkable
class ExpertOps(Protocol):
    """See the module's docstring."""

    @property
    def merges_shared(self) -> bool:
        """Whether experts that all tokens go through are best packed behind the others and chosen by constant columns of ids."""
        ...

    def pack_experts(
        self, experts: Iterable[tuple[QuantizedMatrix, QuantizedMatrix]], first: int = 0
    ) -> PackedExperts:
        """Experts first, first + 1, … as (gate over up [2F, E], down [E, F]). Reads the iterable once, so that only one
        expert need be held unpacked. Every expert may have a format of its own. Not recorded by capture()."""
        ...

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
        """Choose each token's experts, the best first (int32), and their weights (float32). Columns of ids and weights
        behind top_k stay as they are.

        bias_N is added to the scores for the choice alone, not for the weights. counts_N (int64) grows by the number of
        tokens that chose each expert. seq_index (int32): -1: a padding token, which has no experts: ids -1, weights 0.
        """
        ...

    def expert_mlp(
        self,
        x_TE: Array,
        experts: PackedExperts,
        ids_TK: Array,
        weights_TK: Array,
        out_TE: Array,
        accumulate: bool = False,
    ) -> None:
        """out[t] (+)= the sum over k of weights[t, k] * down(silu(gate(x[t])) * up(x[t])) with the matrices of expert
        ids[t, k], in the order of k. Experts that this rank does not hold add nothing. out must not overlap x.

        Only the weights of chosen experts are read.
        """
        ...

    def sigmoid_scale(self, gate_T1: Array, x_TE: Array) -> None:
        """x[t] *= sigmoid(gate[t]), in place."""
        ...
