"""Shards: however a decoder is cut, its ranks together hold all of it, and none is empty."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm.worker.config import (
    AttentionConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
    ShardSpec,
    Span,
    split_evenly,
)


def model(
    heads: int, kv_heads: int, head_dim: int = 16, intermediate: int = 80, vocab: int = 96
) -> ModelConfig:
    return ModelConfig(
        family="llama",
        hidden=64,
        layers=2,
        vocab=vocab,
        max_position=64,
        norm=NormConfig(1e-5),
        attention=AttentionConfig(heads, kv_heads, head_dim, RopeConfig(rotary_dim=head_dim)),
        feed_forward=FeedForwardConfig(intermediate),
    )


@st.composite
def shards(draw: st.DrawFn) -> list[ShardSpec]:
    """All ranks of a split that shard_spec allows."""
    kv_heads = draw(st.integers(1, 8))
    heads = kv_heads * draw(st.integers(1, 8))
    group = draw(st.sampled_from([1, 16, 32]))
    tp = draw(st.integers(1, heads))
    intermediate = draw(st.integers(group * (tp - 1) + 1, group * tp * 3))
    vocab = draw(st.integers(tp, 3000))
    config = model(heads, kv_heads, draw(st.sampled_from([2, 16, 64])), intermediate, vocab)
    return [ShardSpec(config, tp, rank, group) for rank in range(tp)]


def covered(spans: list[Span], total: int) -> bool:
    """In order, without gap or overlap, none empty."""
    starts, stops = [s.start for s in spans], [s.stop for s in spans]
    return starts == [0, *stops[:-1]] and stops[-1] == total and all(s.size > 0 for s in spans)


@given(shards())
def test_shards_partition_everything(ranks: list[ShardSpec]) -> None:
    m = ranks[0].model
    assert covered([s.heads for s in ranks], m.attention.heads)
    assert covered([s.intermediate for s in ranks], m.feed_forward.intermediate)
    assert covered([s.vocab for s in ranks], m.vocab)
    assert covered([s.q_rows for s in ranks], m.attention.heads * m.attention.head_dim)


@given(shards())
def test_every_query_head_has_its_kv_head_beside_it(ranks: list[ShardSpec]) -> None:
    m = ranks[0].model
    for s in ranks:
        needed = {head // m.attention.heads_per_kv for head in range(s.heads.start, s.heads.stop)}
        assert needed == set(range(s.kv_heads.start, s.kv_heads.stop))
        # the backend maps query heads to KV heads by equal parts
        assert s.heads.size % s.kv_heads.size == 0
        assert s.kv_rows == s.kv_heads.scaled(m.attention.head_dim)
    if len(ranks) <= m.attention.kv_heads:
        assert covered([s.kv_heads for s in ranks], m.attention.kv_heads)


@given(shards())
def test_no_quantisation_group_is_cut_and_loads_differ_by_one_unit(ranks: list[ShardSpec]) -> None:
    m, group = ranks[0].model, ranks[0].group
    for s in ranks:
        assert s.intermediate.start % group == 0
        assert s.intermediate.stop % group == 0 or s.intermediate.stop == m.feed_forward.intermediate
    units = [-(-s.intermediate.size // group) for s in ranks]
    assert max(units) - min(units) <= 1


@given(st.integers(0, 10_000), st.integers(1, 100))
def test_split_evenly(total: int, parts: int) -> None:
    spans = split_evenly(total, parts)
    sizes = [s.size for s in spans]
    assert sum(sizes) == total
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("tp", "heads", "kv_heads"),
    [
        (1, [9], [3]),
        (2, [6, 3], [2, 1]),
        (3, [3, 3, 3], [1, 1, 1]),
        (4, [2, 1, 3, 3], [1, 1, 1, 1]),  # the first KV head is held twice
    ],
)
def test_nine_heads_over_three_kv_heads(tp: int, heads: list[int], kv_heads: list[int]) -> None:
    ranks = [ShardSpec(model(9, 3), tp, rank) for rank in range(tp)]
    assert [s.heads.size for s in ranks] == heads
    assert [s.kv_heads.size for s in ranks] == kv_heads


def test_kv_bytes() -> None:
    assert model(9, 3, head_dim=64).kv_bytes_per_token(2) == 2 * 2 * 3 * 64 * 2
