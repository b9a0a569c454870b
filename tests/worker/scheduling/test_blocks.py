"""Block pool and tables: accounting, prefix matching, eviction."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flm.worker.scheduling.blocks import BlockPool, BlockTable, block_digest, root_digest

SIZE = 4


def computed(pool: BlockPool, token_ids: list[int], salt: str = "") -> BlockTable:
    """A table whose tokens were all computed and published."""
    table = BlockTable(pool, salt)
    assert table.open(token_ids) is not None
    table.publish(token_ids, len(token_ids))
    return table


def test_digest_depends_on_tokens_parent_and_salt() -> None:
    root = root_digest("")
    digests = {
        block_digest(root, [1, 2]),
        block_digest(root, [2, 1]),
        block_digest(root, [1, 2, 0]),
        block_digest(block_digest(root, [1, 2]), [1, 2]),
        block_digest(root_digest("tenant"), [1, 2]),
    }
    assert len(digests) == 5
    assert all(len(d) == 16 for d in digests)


def test_no_salt_stands_for_an_adapter_or_a_key() -> None:
    """Clients choose salts; blocks that were computed in another way must stay out of their reach."""
    parts = ("", "a", "rope 3.0", "arope 3.0", "('a', '')")
    roots = {root_digest(salt, adapter, key) for salt in parts for adapter in parts for key in parts}
    assert len(roots) == len(parts) ** 3


def test_digest_is_the_same_in_every_process() -> None:
    assert block_digest(root_digest("a"), [1, 2, 3]).hex() == "e7db669894ace492c065dc614049b594"


def test_published_prefix_is_found_and_shared() -> None:
    pool = BlockPool(8, SIZE)
    first = computed(pool, list(range(10)))
    second = BlockTable(pool)
    assert second.open([*range(8), 99]) == 8
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]
    pool.check([first, second])


@pytest.mark.parametrize("length", [1, SIZE, SIZE + 1, 2 * SIZE])
def test_match_never_covers_the_whole_context(length: int) -> None:
    pool = BlockPool(8, SIZE)
    token_ids = list(range(length))
    first = computed(pool, token_ids)
    second = BlockTable(pool)
    assert second.open(token_ids) == (length - 1) // SIZE * SIZE
    pool.check([first, second])


def test_only_full_computed_blocks_are_published() -> None:
    pool = BlockPool(8, SIZE)
    token_ids = list(range(12))
    first = BlockTable(pool)
    first.open(token_ids)
    first.publish(token_ids, 7)
    assert BlockTable(pool).open(token_ids) == SIZE


def test_salts_do_not_share() -> None:
    pool = BlockPool(8, SIZE)
    computed(pool, list(range(9)), salt="a")
    assert BlockTable(pool, "b").open(list(range(9))) == 0


def test_release_keeps_published_blocks_until_they_are_needed() -> None:
    pool = BlockPool(4, SIZE)
    computed(pool, list(range(9))).release()
    assert (pool.free, pool.cached, pool.available) == (2, 2, 4)
    other = BlockTable(pool)
    other.open(list(range(100, 112)))
    # The tail of the released chain went first, so its head can still be found.
    assert pool.cached == 1
    other.release()
    assert BlockTable(pool).open(list(range(9))) == SIZE


def test_least_recently_used_is_overwritten_first() -> None:
    pool = BlockPool(4, SIZE)
    old, new = list(range(5)), list(range(50, 55))
    for token_ids in (old, new, old):  # the last one uses `old` again
        computed(pool, token_ids).release()
    filler = BlockTable(pool)
    filler.open(list(range(200, 212)))
    assert pool.cached == 1
    filler.release()
    assert BlockTable(pool).open(old) == SIZE
    pool.check()


def test_open_without_room_changes_nothing() -> None:
    pool = BlockPool(4, SIZE)
    first = computed(pool, list(range(8)))
    second = BlockTable(pool)
    assert second.open(list(range(14)), spare=1) is None
    assert second.blocks == []
    pool.check([first, second])
    assert second.open(list(range(14))) == 8
    pool.check([first, second])


def test_idle_hits_are_not_counted_as_room() -> None:
    pool = BlockPool(2, SIZE)
    computed(pool, list(range(8))).release()
    assert BlockTable(pool).open(list(range(9))) is None
    assert pool.available == 2


def test_grow() -> None:
    pool = BlockPool(2, SIZE)
    table = BlockTable(pool)
    table.open([1, 2, 3])
    assert table.grow(4) == []
    added = table.grow(5)
    assert added == table.blocks[1:]
    assert table.grow(9) is None
    pool.check([table])


def test_same_block_computed_twice_is_found_once() -> None:
    pool = BlockPool(8, SIZE)
    token_ids = list(range(9))
    first, second = BlockTable(pool), BlockTable(pool)
    first.open(token_ids)
    second.open(token_ids)
    for table in (first, second):
        table.publish(token_ids, 9)
    first.release()
    second.release()
    assert (pool.free, pool.cached) == (6, 2)
    pool.check([])


def test_forget_drops_the_cache_whoever_uses_it() -> None:
    pool = BlockPool(8, SIZE)
    computed(pool, list(range(9))).release()
    used = computed(pool, list(range(50, 59)))
    pool.forget()
    assert (pool.free, pool.cached) == (5, 0)
    assert [BlockTable(pool).open([*range(start, start + 4), 1]) for start in (0, 50)] == [0, 0]
    used.release()
    assert pool.cached == 0
    pool.check()


def test_check_finds_leaks_and_double_releases() -> None:
    pool = BlockPool(4, SIZE)
    table = BlockTable(pool)
    table.open([1])
    with pytest.raises(AssertionError, match="references"):
        pool.check([])
    blocks = list(table.blocks)
    table.release()
    with pytest.raises(AssertionError, match="more often"):
        pool.release(blocks)
    pool._free.append(0)
    with pytest.raises(AssertionError, match="free 5"):
        pool.check()


class Tables(RuleBasedStateMachine):
    """Random tables over few tokens, so that prefixes collide often. `contents` is the memory: what a rank
    would have written into each block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(10, 2)
        self.live: list[tuple[BlockTable, list[int], str]] = []
        self.contents: dict[int, tuple[str, tuple[int, ...]]] = {}

    @rule(
        token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        salt=st.sampled_from("ab"),
        spare=st.integers(0, 2),
    )
    def open(self, token_ids: list[int], salt: str, spare: int) -> None:
        table, before = BlockTable(self.pool, salt), self.pool.available
        cached = table.open(token_ids, spare)
        if cached is None:
            assert self.pool.available == before
            return
        assert cached < len(token_ids)
        assert self.pool.available >= spare
        for i, block in enumerate(table.blocks):
            prefix = (salt, tuple(token_ids[: 2 * (i + 1)]))
            if 2 * i < cached:
                assert self.contents[block] == prefix
            self.contents[block] = prefix
        self.live.append((table, token_ids, salt))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def append(self, data: st.DataObject, token: int) -> None:
        table, token_ids, salt = data.draw(st.sampled_from(self.live))
        if table.grow(len(token_ids) + 1) is None:
            assert self.pool.available == 0
            return
        token_ids.append(token)
        self.contents[table.blocks[-1]] = (salt, tuple(token_ids))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        table, token_ids, _ = data.draw(st.sampled_from(self.live))
        table.publish(token_ids, data.draw(st.integers(0, len(token_ids))))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table, _, _ = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        table.release()

    @invariant()
    def accounted_for(self) -> None:
        self.pool.check([table for table, _, _ in self.live])

    @invariant()
    def no_table_lost_its_contents(self) -> None:
        for table, token_ids, salt in self.live:
            for i, block in enumerate(table.blocks):
                assert self.contents[block] == (salt, tuple(token_ids[: 2 * (i + 1)]))


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
