"""Ctrl-C and SIGTERM as something to look at, not only as an exception."""

from __future__ import annotations

import signal
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Self


class Interrupts:
    """While entered, SIGINT, SIGTERM and SIGHUP (unless it is ignored, as nohup does) are counted, and raise
    KeyboardInterrupt where `raising` is set.

    The exception alone is not enough: one that is raised inside a callback of a C extension is swallowed there. The
    count stays, for `check` and `wait` to see.
    """

    def __init__(self) -> None:
        self.count, self.raising = 0, True
        self._arrived: SimpleQueue[None] = SimpleQueue()  # the one queue that a signal's handler may put into

    def __enter__(self) -> Self:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """KeyboardInterrupt if one came before and was lost on its way."""
        if self.count:
            raise KeyboardInterrupt

    def wait(self, seconds: float | None = None) -> bool:
        """Whether one came since the last call, or wake() was called, at the latest after `seconds`."""
        try:
            self._arrived.get(timeout=seconds)
        except Empty:
            return False
        while not self._arrived.empty():
            self._arrived.get()
        return True

    def wake(self) -> None:
        """End wait(), from any thread."""
        self._arrived.put(None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self._arrived.put(None)
        if self.raising:
            raise KeyboardInterrupt
