"""Sizes as people write them: "1GiB", "512 MB", 1073741824; and counts: "134.5 M"."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")}
_UNITS |= {f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")}
_LIMIT = 2**63  # bytes: what any size is kept in


def parse_bytes(value: object) -> int:
    """Bytes from a whole number or from text with a unit, binary (GiB) or decimal (GB). ValueError otherwise."""
    if type(value) is int and 0 <= value < _LIMIT:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value) if isinstance(value, str) else None
    if found is None or found[2].lower() not in _UNITS:
        raise ValueError(f"expected a size such as 1GiB, 512MB or a number of bytes, got {value!r:.60}")
    count = float(found[1]) * _UNITS[found[2].lower()]
    if count >= _LIMIT:
        raise ValueError(f"expected less than 8 EiB, got {value:.40}")
    return int(count)


def format_bytes(count: float) -> str:
    """Three digits and a binary unit: "98.7 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB" if abs(count) < 1000 else f"{count:,.0f} TiB"


def format_count(count: float) -> str:
    """Four digits and a decimal unit: "134.5 M", "72.29 B"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f}"


_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]}
Bytes = Annotated[int, BeforeValidator(parse_bytes), WithJsonSchema(_SCHEMA)]
