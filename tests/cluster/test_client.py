"""The Python clients against a real gateway (AsyncClient carries most other tests)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from flm.cluster.client import Client, Sampling
from flm.worker.errors import (
    InvalidRequest,
)

Start = Callable[..., Awaitable[Any]]


async def test_blocking_client(start_cluster: Start) -> None:
    cluster = await start_cluster()

    def use() -> None:
        with Client(cluster.address) as client:
            assert client.ready("m")
            assert not client.ready("gpt")
            assert len("".join(client.generate("hey", Sampling(max_tokens=20, temperature=0)).texts())) > 5
            assert [m.name for m in client.models()] == ["m"]
            assert client.detokenize(client.tokenize("naïve")) == "naïve"
            assert client.model_info().max_context == 512
            with client.chat([{"role": "user", "content": "hi"}]) as stream:
                next(stream)
            with pytest.raises(InvalidRequest, match=r"sampling\.n: expected 1 to 16"):
                next(client.generate("x", Sampling(n=99)))

    await asyncio.to_thread(use)
    await cluster.settled()
    assert len(cluster.seats[0].replica.cancelled) == 1
