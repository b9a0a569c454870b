"""Paged KV cache bookkeeping: which block holds what, who uses it, and which one to overwrite next.

A block is `free` (contents worthless), `referenced` (in at least one block table) or `cached` (in no table, but
its contents are known by digest and may be referenced again). Cached blocks are overwritten in the order in
which they were last used. Nothing here touches the KV memory itself.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b

DIGEST_BYTES = 16  # 128 bits: a chance collision needs some 2**64 different blocks


def root_digest(salt: str, adapter: str = "", key: str = "") -> bytes:
    """Start of a chain of block digests; different salts never share blocks, nor do different adapters, nor prompts with
    another PromptRules.cache_key."""
    root = blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES, person=b"root").digest()
    if not adapter and not key:
        return root
    # apart from the salt, which clients choose: none of theirs may stand for an adapter or a key
    return blake2b(
        root + repr((adapter, key)).encode(), digest_size=DIGEST_BYTES, person=b"computed"
    ).digest()


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of one full block: it stands for these tokens after everything that `parent` stands for."""
    return blake2b(parent + array("i", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()


class BlockPool:
    """All `num_blocks` blocks of one replica, each of `block_size` tokens.

    Every rank of a group has the same blocks, so one pool on the leader speaks for all of them.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0, num_blocks
        assert block_size > 0, block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # taken from the end
        self._references = [0] * num_blocks
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._idle: dict[int, None] = {}  # cached blocks, least recently used first

    @property
    def free(self) -> int:
        """Blocks without known contents."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks that no table uses but whose contents can be found."""
        return len(self._idle)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give, at the cost of cached ones."""
        return len(self._free) + len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens occupy."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each and no contents; `count` must be available."""
        assert count <= self.available, f"{count} blocks wanted, {self.available} available"
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks that hold the longest prefix of the chain `digests`, not yet referenced."""
        blocks: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` count as available now."""
        return sum(block in self._idle for block in blocks)

    def reference(self, blocks: Iterable[int]) -> None:
        """One more reference to each of `blocks`, which `match` found."""
        for block in blocks:
            self._idle.pop(block, None)
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each block of one table. A chain is of no use without its head, so its tail
        is given up first."""
        for block in reversed(blocks):
            count = self._references[block] - 1
            assert count >= 0, f"block {block} released more often than referenced"
            self._references[block] = count
            if count == 0:
                if self._digest_of[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full, computed block findable. Of two blocks with the same contents only the first one is."""
        assert self._references[block] > 0, f"block {block} published without a reference"
        if digest not in self._block_of and self._digest_of[block] is None:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def forget(self) -> None:
        """Make nothing findable any more: the KV memory behind the cache is gone."""
        self._free += self._idle
        self._idle.clear()
        self._block_of.clear()
        self._digest_of = [None] * self.num_blocks

    def _evict(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block]
        digest = self._digest_of[block]
        assert digest is not None, f"cached block {block} has no digest"
        del self._block_of[digest]
        self._digest_of[block] = None
        return block

    def check(self, tables: Iterable[BlockTable] | None = None) -> None:
        """Prove free + referenced + cached == total and that no block is in two states.

        With `tables` (all that exist) also prove that they account for every reference. AssertionError
        with the numbers otherwise.
        """
        referenced = {b for b, n in enumerate(self._references) if n > 0}
        free, cached = set(self._free), set(self._idle)
        counts = f"free {self.free} + referenced {len(referenced)} + cached {self.cached}"
        assert self.free + len(referenced) + self.cached == self.num_blocks, f"{counts} != {self.num_blocks}"
        assert len(free | referenced | cached) == self.num_blocks, f"{counts}: some block is in two states"
        known = {b: d for b, d in enumerate(self._digest_of) if d is not None}
        assert {b: d for d, b in self._block_of.items()} == known, "digests and blocks disagree"
        assert cached == known.keys() - referenced, f"{counts}: cached blocks are not the idle published ones"
        if tables is not None:
            uses = Counter(block for table in tables for block in table.blocks)
            wrong = {b: (n, uses[b]) for b, n in enumerate(self._references) if n != uses[b]}
            assert not wrong, f"block: (references, uses in tables) = {wrong}"


class BlockTable:
    """The blocks of one sequence, in order of position: token p lives in blocks[p // block_size]."""

    def __init__(self, pool: BlockPool, salt: str = "", adapter: str = "", key: str = "") -> None:
        self.blocks: list[int] = []
        self._pool = pool
        self._capacity = 0  # tokens that fit in `blocks`
        self._published = 0  # leading blocks that were offered to the cache or came from it
        self._chain = [
            root_digest(salt, adapter, key)
        ]  # chain[i]: the first i blocks' tokens; survives release()

    def open(self, token_ids: Sequence[int], spare: int = 0) -> int | None:
        """Take blocks for all of `token_ids`, as many as possible out of the cache.

        Returns how many leading tokens are already computed, always fewer than all of them: the last one
        has to be computed to get logits. Returns None and changes nothing unless `spare` blocks would
        still be available afterwards.
        """
        assert not self.blocks, "open() of a table in use"
        pool = self._pool
        full = (len(token_ids) - 1) // pool.block_size
        self._extend_chain(token_ids, full)
        hits = pool.match(self._chain[1 : full + 1])
        missing = pool.blocks_for(len(token_ids)) - len(hits)
        if missing + pool.count_idle(hits) + spare > pool.available:
            return None
        pool.reference(hits)
        self.blocks = hits + pool.allocate(missing)
        self._capacity = len(self.blocks) * pool.block_size
        self._published = len(hits)
        return len(hits) * pool.block_size

    def grow(self, num_tokens: int) -> list[int] | None:
        """Make room for `num_tokens` tokens in all; the blocks that were added, or None where the pool has
        too few (nothing changes then)."""
        if num_tokens <= self._capacity:
            return []
        missing = self._pool.blocks_for(num_tokens) - len(self.blocks)
        if missing > self._pool.available:
            return None
        added = self._pool.allocate(missing)
        self.blocks += added
        self._capacity = len(self.blocks) * self._pool.block_size
        return added

    def publish(self, token_ids: Sequence[int], num_computed: int) -> None:
        """Offer every full block among the first `num_computed` tokens to the cache."""
        full = num_computed // self._pool.block_size
        if full <= self._published:
            return
        self._extend_chain(token_ids, full)
        for i in range(self._published, full):
            self._pool.publish(self.blocks[i], self._chain[i + 1])
        self._published = full

    def release(self) -> None:
        """Give all blocks back; what was published stays in the cache until it is overwritten."""
        self._pool.release(self.blocks)
        self.blocks, self._capacity, self._published = [], 0, 0

    def _extend_chain(self, token_ids: Sequence[int], num_blocks: int) -> None:
        size = self._pool.block_size
        for i in range(len(self._chain) - 1, num_blocks):
            self._chain.append(block_digest(self._chain[i], token_ids[i * size : (i + 1) * size]))
