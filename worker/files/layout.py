"""How a checkpoint file's tensors must lie: none over another, none beyond the file's end."""

from __future__ import annotations

from collections.abc import Iterable


def layout_fault(places: Iterable[tuple[str, int, int]], start: int, size: int) -> str | None:
    """What is wrong with a file of `size` bytes whose tensors (name, first byte, bytes) may begin at byte `start`; None: nothing.

    Tensors without bytes may lie anywhere.
    """
    end, before = start, "the header"
    for name, offset, nbytes in sorted(places, key=lambda place: place[1:]):
        if not nbytes:
            continue
        if offset < end:
            return f"tensor {name!r} at byte {offset} overlaps {before}, which ends at {end}"
        end, before = offset + nbytes, f"tensor {name!r}"
    if before != "the header" and end > size:
        return f"truncated: {end} bytes expected, where {before} ends, found {size}"
    return None
