"""Frozen descriptions: one decoder (`ModelConfig`) and one rank's part of it (`ShardSpec`)."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from flm.worker.config_parts import ExpertsConfig, LatentConfig, NormConfig, PrefixConfig, RopeConfig


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention: `kv_heads` key-value heads, each shared by heads / kv_heads query heads."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeConfig
    qkv_bias: bool = False
    output_bias: bool = False
    recurrent: bool = False  # no attention: RWKV-4's recurrence over heads * head_dim channels
    prefix: PrefixConfig | None = None  # None: every token sees those before it
    qk_norm: bool = False  # RMSNorm over every head of q and k, before they rotate
    alibi: bool = False  # scores fall linearly with distance (arXiv:2108.12409)
    score_scale: float = 0.0  # what scores are multiplied by; 0: head_dim ** -0.5
    logn_length: int = (
        0  # q at position p > this is multiplied by log(p) / log(this), p counted from 1; 0: never
    )
    latent: LatentConfig | None = None  # keys and values are cached as latents; kv_heads is heads

    @property
    def heads_per_kv(self) -> int:
        return self.heads // self.kv_heads

    @property
    def value_dim(self) -> int:
        """Values of a head's output."""
        return self.latent.value if self.latent else self.head_dim

    @property
    def scale(self) -> float:
        """What scores are multiplied by before the softmax."""
        return self.score_scale or float(self.head_dim**-0.5)


@dataclass(frozen=True)
class FeedForwardConfig:
    """down(silu(gate(x)) * up(x)) where `gated`, else down(gelu(up(x))); `intermediate` values wide. `parallel`: it reads
    what the attention reads, and both are added at once."""

    intermediate: int
    bias: bool = False
    gated: bool = True
    parallel: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The family-neutral description of one decoder, made from config.json or GGUF by `families/`."""

    family: str
    hidden: int
    layers: int
    vocab: int
    max_position: int
    norm: NormConfig
    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    experts: ExpertsConfig | None = None
    tie_embeddings: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what every layer adds
    logit_scale: float = 1.0
    head_bias: bool = False
    embedding_norm: bool = False  # a norm between the embedding and the first layer
    unit_head: bool = False  # rows of the LM head are divided by their norms as they are read
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def cache_key(self, prompt_ids: tuple[int, ...]) -> str:
        """Prompts with different keys give different K and V to the same tokens."""
        context = prompt_ids[: self.uncut(prompt_ids)]
        if context:
            return "context " + array("i", context).tobytes().hex()
        stretched = self.attention.rope.stretch(len(prompt_ids))
        return "" if stretched == 1.0 else f"rope {stretched!r}"

    @property
    def shares_prefixes(self) -> bool:
        """Whether a sequence can begin with what another has cached; a recurrent state is only its own."""
        return not self.attention.recurrent

    def uncut(self, prompt_ids: tuple[int, ...]) -> int:
        """Leading tokens of a prompt that see one another and so have to be computed in one step."""
        return 0 if self.attention.prefix is None else self.attention.prefix.length(prompt_ids)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that the cache keeps of one token over all layers, unsharded."""
        a = self.attention
        values = a.latent.cached if a.latent else 2 * a.kv_heads * a.head_dim
        return self.layers * values * itemsize

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer has experts."""
        return self.experts is not None and layer not in self.experts.dense_layers


@dataclass(frozen=True)
class Span:
    """A half-open range of rows, columns, heads or tokens."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def scaled(self, unit: int) -> Span:
        return Span(self.start * unit, self.stop * unit)


def split_evenly(total: int, parts: int) -> tuple[Span, ...]:
    """Cut `total` units into `parts` spans that differ by at most one; the first ones take the remainder."""
    base, extra = divmod(total, parts)
    starts = [i * base + min(i, extra) for i in range(parts + 1)]
    return tuple(Span(a, b) for a, b in pairwise(starts))


@dataclass(frozen=True)
class ShardSpec:
    """One rank's place on the tensor-parallel axis of `model`. It owns every slice computation; model code
    contains no rank arithmetic.

    KV heads are the unit of the attention split and query heads follow theirs. Where there are more ranks
    than KV heads, KV heads are replicated and query heads are split within the head's group. The MLP is
    split in units of `group` inputs so that no quantisation group of the row-parallel down projection is
    cut; the vocabulary is split in units of 64 rows (the kernels' panel height). Experts are cut as the MLP is or,
    with `expert_parallel`, spread over the ranks whole.
    """

    model: ModelConfig
    tp_size: int = 1
    tp_rank: int = 0
    group: int = 1  # quantisation group along K, 1 for float weights
    expert_parallel: bool = False

    def for_rank(self, rank: int) -> ShardSpec:
        return replace(self, tp_rank=rank)

    @cached_property
    def kv_heads(self) -> Span:
        """KV heads this rank holds."""
        a, tp = self.model.attention, self.tp_size
        if tp <= a.kv_heads:
            return split_evenly(a.kv_heads, tp)[self.tp_rank]
        owner = self._kv_owner(self.tp_rank)
        return Span(owner, owner + 1)

    @cached_property
    def heads(self) -> Span:
        """Query heads this rank computes; whole KV groups, or a part of one where tp > kv_heads."""
        a, tp = self.model.attention, self.tp_size
        if tp <= a.kv_heads:
            return self.kv_heads.scaled(a.heads_per_kv)
        owner = self._kv_owner(self.tp_rank)
        sharers = [r for r in range(tp) if self._kv_owner(r) == owner]
        part = split_evenly(a.heads_per_kv, len(sharers))[sharers.index(self.tp_rank)]
        base = owner * a.heads_per_kv
        return Span(base + part.start, base + part.stop)

    def _kv_owner(self, rank: int) -> int:
        spans = split_evenly(self.tp_size, self.model.attention.kv_heads)
        return next(h for h, s in enumerate(spans) if s.start <= rank < s.stop)

    @cached_property
    def intermediate(self) -> Span:
        """Rows of gate and up, columns of down."""
        return self._columns(self.model.feed_forward.intermediate)

    def _columns(self, width: int) -> Span:
        span = split_evenly(-(-width // self.group), self.tp_size)[self.tp_rank].scaled(self.group)
        return Span(min(span.start, width), min(span.stop, width))

    @cached_property
    def experts(self) -> Span:
        """Experts of a layer that this rank holds, whole or in part."""
        count = self.model.experts.count if self.model.experts else 0
        return split_evenly(count, self.tp_size)[self.tp_rank] if self.expert_parallel else Span(0, count)

    @cached_property
    def expert_width(self) -> Span:
        """Rows of gate and up, columns of down, of each of these experts."""
        width = self.model.experts.width if self.model.experts else 0
        return Span(0, width) if self.expert_parallel else self._columns(width)

    @cached_property
    def shared_width(self) -> Span:
        """The same of the shared expert."""
        return self._columns(self.model.experts.shared if self.model.experts else 0)

    @cached_property
    def vocab(self) -> Span:
        """Rows of the embedding and the LM head."""
        unit = 64 if self.model.vocab >= 64 * self.tp_size else 1
        units = -(-self.model.vocab // unit)
        span = split_evenly(units, self.tp_size)[self.tp_rank].scaled(unit)
        return Span(span.start, min(span.stop, self.model.vocab))

    @property
    def q_rows(self) -> Span:
        """Rows of q_proj."""
        return self.heads.scaled(self.model.attention.head_dim)

    @property
    def value_cols(self) -> Span:
        """Columns of o_proj."""
        return self.heads.scaled(self.model.attention.value_dim)

    @property
    def kv_rows(self) -> Span:
        """Rows of k_proj and v_proj."""
        return self.kv_heads.scaled(self.model.attention.head_dim)

    def share(self, split: str) -> float:
        """The part of a tensor that this rank holds, by the axis that ranks share it by (see canonical.TensorSpec)."""
        m, e = self.model, self.model.experts
        parts = {
            "heads": (self.heads.size, m.attention.heads),
            "kv": (self.kv_heads.size, m.attention.kv_heads),
            "ffn": (self.intermediate.size, m.feed_forward.intermediate),
            "vocab": (self.vocab.size, m.vocab),
            "whole": (1, 1),
        }
        if e is not None:
            parts["experts"] = (self.experts.size * self.expert_width.size, e.count * e.width)
            parts["shared"] = (self.shared_width.size, e.shared)
        part, whole = parts[split]
        return part / whole
