"""A gateway that cannot start stays to say why: restarting it would only fail again."""

from __future__ import annotations

import pytest

from flm.cluster import gateway_process
from flm.cluster.gateway_process import GatewayProcess
from flm.cluster.state import Desired, ModelFacts
from flm.worker.errors import CheckpointError

TEXT = """\
name: test
models:
  - name: m
    path: package:nothing
"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CheckpointError("m.gguf", "no tokenizer"), "m.gguf: no tokenizer"),
        (
            TypeError("'int' object is not iterable"),
            "internal error: TypeError(\"'int' object is not iterable\")",
        ),
    ],
)
async def test_what_stops_it_is_kept(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    class Lame:
        def __init__(self, *_: object, **__: object) -> None: ...
        async def start(self, patience: float = 0.0) -> str:
            raise error

    monkeypatch.setattr(gateway_process, "Gateway", Lame)
    process = GatewayProcess(Desired(TEXT, "c.yaml", {"m": 1}, {"m": ModelFacts(1, 512)}, "key"))
    await process.run()
    assert (await process.status())[1] == said
    await process.set_routes("m", [], 1)  # as a controller that knows nothing of it goes on doing
    await process.stop(0.0)
