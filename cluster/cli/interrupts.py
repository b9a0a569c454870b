"""Ctrl-C and SIGTERM as something to look at, not only as an exception."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Self


class Interrupts:
    """While entered, SIGINT, SIGTERM and SIGHUP (unless it is ignored, as nohup does) are counted, and raise KeyboardInterrupt where `raising` is set.

    The exception alone is not enough: one that is raised inside a callback of a C extension is swallowed there. The
    count stays, for `check` and `wait` to see.
    """

    def __init__(self) -> None:
        self.count, self.raising = 0, True
        self._arrived = threading.Event()

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
        """Whether one came, at the latest after `seconds`; clears that."""
        came = self._arrived.wait(seconds)
        self._arrived.clear()
        return came

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self._arrived.set()
        if self.raising:
            raise KeyboardInterrupt
