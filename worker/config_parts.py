"""Parts of a decoder's description that only some models have: latent attention, mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass

from flm.kernels.expert_ops import Routing


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434). A token's cache entry is a latent of `rank` values and one
    rotated key for all heads. A head's query is `plain` values, then the rotary ones; its value has `value` values.

    query_rank: width of the latent that queries come from; 0: they come from the hidden state.
    """

    rank: int
    plain: int
    rotary: int
    value: int
    query_rank: int = 0
    norm_eps: float = 1e-6  # of the norms of both latents

    @property
    def cached(self) -> int:
        """Values of a cache entry."""
        return self.rank + self.rotary


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of the feed-forward part, in all layers but `dense_layers`.

    width: of one expert. shared: width of the expert that every token goes through, 0: none; `shared_gate`: its result is
    scaled by a learned gate. correction_bias: the router adds a learned bias for its choice.
    """

    width: int
    routing: Routing
    shared: int = 0
    shared_gate: bool = False
    correction_bias: bool = False
    dense_layers: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return self.routing.experts
