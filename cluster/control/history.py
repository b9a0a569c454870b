"""What is remembered of a replica while it is built again, and by the controller after the next one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from flm.cluster.control.group import ReplicaGroup
from flm.cluster.state import read_json, write_atomic

HISTORY = "history.json"


@dataclass(frozen=True)
class Past:
    """`failures`: quick ones in a row; `message`: of the last one; `refused`: nodes that it would fail on again."""

    restarts: int = 0
    failures: int = 0
    message: str = ""
    refused: tuple[str, ...] = ()


class History:
    """Of replicas that failed before, by their ids; in a file that is replaced at every change."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / HISTORY
        self._pasts = {name: Past(**fields) for name, fields in (read_json(self._file) or {}).items()}

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._pasts))

    def __contains__(self, replica_id: str) -> bool:
        return replica_id in self._pasts

    def recall(self, group: ReplicaGroup) -> None:
        """Give a new group what is known of its replica."""
        past = self._pasts.get(group.replica_id, Past())
        group.restarts, group.failures, group.message = past.restarts, past.failures, past.message
        group.refused = tuple(past.refused)

    def note(self, group: ReplicaGroup) -> None:
        past = Past(group.restarts, group.failures, group.message, group.refused)
        self._keep({**self._pasts, group.replica_id: past})

    def forgive(self, group: ReplicaGroup) -> None:
        """An operator thinks that it can be started now."""
        group.failures, group.refused = 0, ()
        if group.replica_id in self._pasts:
            self.note(group)

    def forget(self, replica_id: str) -> None:
        self._keep({name: past for name, past in self._pasts.items() if name != replica_id})

    def _keep(self, pasts: dict[str, Past]) -> None:
        if pasts != self._pasts:
            self._pasts = pasts
            write_atomic(self._file, {name: asdict(past) for name, past in pasts.items()})
