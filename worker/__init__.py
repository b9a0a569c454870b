"""The inference engine of flm-cluster: usable as a library, with no Ray and no gRPC.

Names are resolved on first use, so that importing one small module does not load the whole engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flm.worker.engine import Completion, Engine
    from flm.worker.errors import FlmError
    from flm.worker.request import FinishReason, Request, SamplingParams, TokenEvent

__all__ = ["Completion", "Engine", "FinishReason", "FlmError", "Request", "SamplingParams", "TokenEvent"]

_HOME = {"Completion": "engine", "Engine": "engine", "FlmError": "errors"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'request')}"), name)
