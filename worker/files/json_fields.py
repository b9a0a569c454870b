"""Typed access to the fields of a config.json or of GGUF metadata."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from flm.worker.errors import CheckpointError

MAX_SIZE = 2**31 - 1  # of anything counted
MAX_NUMBER = 1e12  # of anything else: its square and its logarithm are still numbers
_MISSING = object()


class Fields:
    """A checkpoint's description. Every getter raises CheckpointError naming file, field and what was expected."""

    def __init__(self, file: Path, raw: dict[str, Any], prefix: str = "") -> None:
        self.file, self.raw, self._prefix = file, raw, prefix

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(str(self.file), message)

    def get(self, name: str) -> Any:
        """The value, or None where it is absent or null."""
        return self.raw.get(self._prefix + name)

    def integer(self, name: str, default: Any = _MISSING, least: int = 1) -> int:
        """A whole number from `least` to MAX_SIZE."""
        value = self._value(name, default, f"a whole number >= {least}")
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # GGUF may give one value per layer
        if type(value) is not int or value < least:
            raise self.fail(
                f"{self._prefix}{name}: a whole number >= {least} expected, found {_shown(value)}"
            )
        if value > MAX_SIZE:
            raise self.fail(f"{self._prefix}{name}: at most {MAX_SIZE} expected, found {_shown(value)}")
        return value

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A number > 0, at most MAX_NUMBER."""
        value = self._value(name, default, "a number > 0")
        if type(value) not in (int, float) or not 0 < value < math.inf:  # NaN is not either
            raise self.fail(f"{self._prefix}{name}: a number > 0 expected, found {_shown(value)}")
        if value > MAX_NUMBER:
            raise self.fail(f"{self._prefix}{name}: at most {MAX_NUMBER:g} expected, found {_shown(value)}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default, "true or false")
        if not isinstance(value, bool):
            raise self.fail(f"{self._prefix}{name}: true or false expected, found {_shown(value)}")
        return value

    def section(self, name: str) -> Fields | None:
        """A nested object, or None where it is absent or null."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.fail(f"{self._prefix}{name}: an object expected, found {_shown(value)}")
        return None if value is None else Fields(self.file, value)

    def items(self, name: str) -> list[Any]:
        """A list; empty where it is absent or null."""
        value = self.get(name)
        if value is not None and not isinstance(value, list):
            raise self.fail(f"{self._prefix}{name}: a list expected, found {_shown(value)}")
        return value or []

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One token id or a list of them; absent and negative ones (a placeholder of old files) are left out."""
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(i) is not int for i in ids):
            raise self.fail(
                f"{self._prefix}{name}: a token id or a list of them expected, found {_shown(value)}"
            )
        return tuple(i for i in ids if i >= 0)

    def _value(self, name: str, default: Any, expected: str) -> Any:
        value = self.get(name)
        if value is None and default is _MISSING:
            raise self.fail(f"{self._prefix}{name} is missing; {expected} expected")
        return default if value is None else value


def read_json(path: Path) -> Fields:
    """The fields of a JSON file that holds an object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), f"is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(str(path), f"a JSON object expected, found {_shown(raw)}")
    return Fields(path, raw)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
