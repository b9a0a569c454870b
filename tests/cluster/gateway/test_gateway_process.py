"""A gateway that cannot start stays to say why: restarting it would only fail again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flm.cluster.gateway import gateway_process
from flm.cluster.gateway.gateway_process import GatewayProcess
from flm.cluster.gateway.served_model import ServedModel
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


async def test_it_starts_as_the_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    class Told:
        def __init__(self, models: list[ServedModel], listen: str, **options: object) -> None:
            given.update(options, models=models, listen=listen)

        async def start(self, patience: float) -> None: ...

    monkeypatch.setattr(gateway_process, "Gateway", Told)
    text = TEXT + "    generation_config: none\ngateway: {listen: '127.0.0.1:4321', replica_wait: 2.5}\n"
    facts = {"m": ModelFacts(1, 512, rows=96, eos_token_ids=(2,))}
    await GatewayProcess(Desired(text, "c.yaml", {"m": 1}, facts, "key")).run()
    assert (given["listen"], given["replica_wait"], given["replica_key"]) == ("127.0.0.1:4321", 2.5, "key")
    model = ServedModel("m", "package:nothing", 512, rows=96, eos_token_ids=(2,), generation_config=False)
    assert given["models"] == [replace(model, quantization="")]
