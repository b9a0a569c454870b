"""Parts of a decoder's description: rotation, norms, contexts that see themselves, latent attention, mixtures of experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flm.kernels.expert_ops import Routing


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. `scaling` "none" | "linear" | "dynamic" | "ntk_steps" | "llama3" | "yarn" | "factors" |
    "two_dimensional" (see PrefixConfig); the other fields only matter for the kinds that read them. Rotate-half pairing
    always (interleaved checkpoints are permuted at load). "dynamic" and "ntk_steps" depend on the length of the prompt."""

    theta: float = 10000.0
    rotary_dim: int = 0  # values of each head that rotate, even; 0: positions do not enter here
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    factors: tuple[float, ...] = ()  # "factors": what each of the rotary_dim / 2 frequencies is divided by
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    whole_bounds: bool = True  # "yarn": the frequencies to blend are bounded by whole indices
    magnitude: float = 1.0  # of rotated vectors

    @property
    def per_request(self) -> bool:
        """Whether requests rotate differently, by the length of their prompts."""
        return self.scaling in ("dynamic", "ntk_steps")

    def stretch(self, prompt_length: int) -> float:
        """What theta is multiplied by, to the power d / (d - 2), for a request with a prompt of that length: 1 up to the
        trained length. It stays what it was at the prompt, so that cached keys keep their angles.

        "dynamic" is transformers' formula of the length at hand; "ntk_steps" that of Qwen's first release, the same for
        all prompts between two powers of two of the trained length."""
        trained = self.original_max_position
        if not self.per_request or prompt_length <= trained:
            return 1.0
        if self.scaling == "dynamic":
            return self.factor * prompt_length / trained - (self.factor - 1)
        return float(2 ** math.ceil(math.log2(prompt_length / trained) + 1) - 1)


@dataclass(frozen=True)
class NormConfig:
    """A normalisation over the hidden width: `kind` "rms" (scale only) or "layer" (mean removed). `residual_factor` other
    than 0: the normed value times this, not the value itself, goes on beside what the layer adds (ChatGLM-6B).
    `sandwich`: what a part gives is normed too, by a norm of its own, before it is added. `final_eps`: of the last norm,
    where it has one of its own."""

    eps: float
    kind: str = "rms"
    bias: bool = False
    residual_factor: float = 0.0
    sandwich: bool = False
    final_eps: float | None = None


@dataclass(frozen=True)
class PrefixConfig:
    """A prompt's context is what stands before `start_token`; its tokens see all of it. Tokens after it stand, along the
    context, at the first of `mask_tokens` that is in it."""

    start_token: int
    mask_tokens: tuple[int, ...]

    def length(self, prompt_ids: Sequence[int]) -> int:
        """Tokens of the context; 0 where the prompt has no start token, so that all is causal."""
        return prompt_ids.index(self.start_token) if self.start_token in prompt_ids else 0

    def mask_position(self, prompt_ids: Sequence[int]) -> int:
        context = prompt_ids[: self.length(prompt_ids)]
        return next((context.index(token) for token in self.mask_tokens if token in context), len(context))


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434). A token's cache entry is a latent of `rank` values and one
    rotated key for all heads. A head's query is `plain` values, then the rotary ones; its value has `value` values.

    query_rank: width of the latent that queries come from; 0: they come from the hidden state. turned_keys: the checkpoint
    has the rows that make keys and values apart, the former already turned round for the query.
    """

    rank: int
    plain: int
    rotary: int
    value: int
    query_rank: int = 0
    norm_eps: float = 1e-6  # of the norms of both latents
    turned_keys: bool = False

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
