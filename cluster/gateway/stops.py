"""Stop strings in text that arrives in pieces of any size."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the first of `stops` to be complete and lets nothing through that belongs to it.

    Of the text so far it holds back only the longest suffix that could still begin a stop string. What comes out
    does not depend on how the text was cut: the stop that ends first wins, of two that end together the longer.
    """

    __slots__ = ("_held", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would match everywhere"
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is certain not to be part of a stop. Sets `matched` when one is complete; it and everything
        after it are dropped."""
        assert self.matched is None, "text after a stop"
        buffer = self._held + text
        self._held = ""
        end = len(buffer) + 1
        start = 0
        for stop in self._stops:
            at = buffer.find(stop)
            if at >= 0 and (at + len(stop), at) < (end, start):
                end, start, self.matched = at + len(stop), at, stop
        if self.matched is not None:
            return buffer[:start]
        safe = self._safe_length(buffer)
        self._held = buffer[safe:]
        return buffer[:safe]

    def flush(self) -> str:
        """What is held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _safe_length(self, buffer: str) -> int:
        """Where the longest suffix that begins a stop starts."""
        safe = len(buffer)
        for stop in self._stops:
            at = buffer.find(stop[0], max(len(buffer) - len(stop) + 1, 0))
            while 0 <= at < safe:
                if stop.startswith(buffer[at:]):
                    safe = at
                at = buffer.find(stop[0], at + 1)
        return safe
