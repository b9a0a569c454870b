"""Names that a cluster.yaml gives: of the cluster, of models and of their adapters."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", value):
        raise ValueError(
            f"expected 1 to 63 letters, digits, '.', '_' or '-' with a letter or digit at both ends, got {value!r}"
        )
    return value


Name = Annotated[str, AfterValidator(_name)]
