"""ClassicOps: what a backend needs beside `Backend` for decoders older than Llama's: LayerNorm and GELU.

Shape legend: T tokens, E hidden, F feed-forward width. What backend.py says of every op holds here too.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

Array = Any


@runtime_checkable
class ClassicOps(Protocol):
    """A backend without them cannot serve such models."""

    def layer_norm(
        self,
        x_TE: Array,
        weight_E: Array,
        bias_E: Array | None,
        eps: float,
        out_TE: Array,
        delta_TE: Array | None = None,
        keep: float = 1.0,
        replace: bool = False,
    ) -> None:
        """x = keep * x + delta, in place, where there is a delta; then out = (x - mean) / sqrt(variance + eps) * weight
        + bias (arXiv:1607.06450). out may be x; where `replace`, x becomes what out is, in its own type."""
        ...

    def gelu(self, x_TF: Array, out_TF: Array) -> None:
        """out = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x³))) (arXiv:1606.08415). out may be x."""
        ...
