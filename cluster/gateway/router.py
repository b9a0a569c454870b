"""Which replica a request goes to: the one with the fewest outstanding tokens, or the one that has its prefix.

Pure: no I/O and no clock. Outstanding tokens are those this gateway still expects of a replica, were every request
to use all of its max_tokens. A replica that served the same leading blocks of a prompt probably still has their
KV; it is preferred as long as the extra tokens to wait for there are no more than the tokens its cache saves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

BLOCK_SIZE = 16  # tokens per hashed block; need not be the replicas' own
MAX_IMBALANCE = 4096  # tokens that affinity may add to a replica beyond the least loaded one
MAX_REMEMBERED = 16384  # blocks whose last replica is kept


@dataclass(frozen=True)
class ReplicaRoute:
    """One replica as the controller sees it. `state` is "ready" where it takes new requests; any other
    ("starting", "loading", "draining", "failed", "stopped") keeps them away."""

    replica_id: str
    address: str  # host:port of its flm.v1.Replica service
    state: str = "ready"


@dataclass(slots=True, eq=False)
class ReplicaView:
    """One replica as the gateway sees it."""

    replica_id: str
    address: str
    state: str
    outstanding: int = 0  # tokens
    broken: bool = False  # a stream broke here; kept aside until a probe or new routes clear it
    chosen: int = 0  # when it was last chosen, in choices: equals are served in turn

    @property
    def ready(self) -> bool:
        return self.state == "ready" and not self.broken


class Router:
    """The replicas of one model."""

    def __init__(self, *, max_imbalance: int = MAX_IMBALANCE, max_remembered: int = MAX_REMEMBERED) -> None:
        self.replicas: dict[str, ReplicaView] = {}
        self._max_imbalance = max_imbalance
        self._max_remembered = max_remembered
        self._last: OrderedDict[int, str] = OrderedDict()  # chained block hash → replica id
        self._choices = 0

    def update(self, routes: Iterable[ReplicaRoute]) -> None:
        """Take the controller's word: replicas it does not name are gone, those it calls ready are whole again.
        Outstanding tokens of replicas that stay are kept; a new address means a rebuilt group."""
        before, self.replicas = self.replicas, {}
        for route in routes:
            view = before.get(route.replica_id)
            if view is None or view.address != route.address:
                view = ReplicaView(route.replica_id, route.address, route.state)
            view.state, view.broken = route.state, False
            self.replicas[route.replica_id] = view

    @property
    def num_ready(self) -> int:
        return sum(view.ready for view in self.replicas.values())

    def choose(
        self, prompt_ids: Sequence[int], cache_salt: str = "", exclude: Collection[str] = ()
    ) -> ReplicaView | None:
        """A ready replica that is not in `exclude` (replica ids), or None. Remembers the choice."""
        candidates = [v for v in self.replicas.values() if v.ready and v.replica_id not in exclude]
        if not candidates:
            return None
        least = min(candidates, key=lambda v: (v.outstanding, v.chosen))
        hashes = block_hashes(prompt_ids, cache_salt)
        chosen = self._with_prefix(hashes, least, {v.replica_id: v for v in candidates}) or least
        self._remember(hashes, chosen.replica_id)
        self._choices += 1
        chosen.chosen = self._choices
        return chosen

    def _with_prefix(
        self, hashes: list[int], least: ReplicaView, candidates: dict[str, ReplicaView]
    ) -> ReplicaView | None:
        """The candidate with the longest known prefix that is worth its queue."""
        for index in range(len(hashes) - 1, -1, -1):
            view = candidates.get(self._last.get(hashes[index], ""))
            if view is not None:
                saved = min((index + 1) * BLOCK_SIZE, self._max_imbalance)
                return view if view.outstanding - least.outstanding <= saved else None
        return None

    def _remember(self, hashes: list[int], replica_id: str) -> None:
        for value in hashes:
            self._last[value] = replica_id
            self._last.move_to_end(value)
        while len(self._last) > self._max_remembered:
            self._last.popitem(last=False)


def block_hashes(prompt_ids: Sequence[int], cache_salt: str) -> list[int]:
    """A chained hash for each whole block of the prompt: equal hashes mean equal prefixes and salts."""
    hashes: list[int] = []
    value = hash(cache_salt)
    for start in range(0, len(prompt_ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
        value = hash((value, tuple(prompt_ids[start : start + BLOCK_SIZE])))
        hashes.append(value)
    return hashes
