"""The key of a model in cluster.yaml that names its LoRA adapters."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic import WithJsonSchema as JsonSchema

from flm.cluster.settings.names import Name
from flm.worker.adapters.adapter import AdapterSource


class AdapterSection(BaseModel):
    """An adapter's directory, and the largest rank that it may have; 0: any."""

    model_config = ConfigDict(frozen=True)

    path: str
    max_rank: int = 0


def _adapter(value: object) -> object:
    if isinstance(value, AdapterSection):
        return value
    given: dict[Any, Any] = value if isinstance(value, dict) else {"path": value}
    path, rank = given.get("path"), given.get("max_rank", 1)
    if (
        set(given) <= {"path", "max_rank"}
        and isinstance(path, str)
        and path
        and type(rank) is int
        and rank > 0
    ):
        return AdapterSection(**given)
    raise ValueError(f"expected a directory, or {{path: directory, max_rank: 64}}, got {value!r:.80}")


_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {
            "type": "object",
            "properties": {
                "path": {"type": "string", "minLength": 1},
                "max_rank": {"type": "integer", "minimum": 1},
            },
            "required": ["path"],
            "additionalProperties": False,
        },
    ]
}


class AdapterFields(BaseModel):
    """LoRA adapters in PEFT's layout, which requests choose by name."""

    adapters: dict[Name, Annotated[AdapterSection, BeforeValidator(_adapter), JsonSchema(_SCHEMA)]] = {}

    @property
    def adapter_sources(self) -> tuple[AdapterSource, ...]:
        return tuple(AdapterSource(name, a.path, a.max_rank) for name, a in self.adapters.items())
