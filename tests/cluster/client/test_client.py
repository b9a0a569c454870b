"""The Python clients against a real gateway (AsyncClient carries most other tests)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from flm.cluster.client import AsyncClient, Client, Sampling
from flm.worker.errors import ConfigError, InvalidRequest

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


BAD: Any = 5
MISFITS: list[tuple[str, Callable[[Any], Any]]] = [
    ("text", lambda client: client.tokenize("\udcff")),
    ("ids", lambda client: client.detokenize([2**40])),
    ("ids", lambda client: client.detokenize(BAD)),
    ("model", lambda client: client.tokenize("x", model="\udcff")),
    ("model", lambda client: client.detokenize([1], model="\udcff")),
    ("model", lambda client: client.generate("x", model="\udcff")),
    ("model", lambda client: client.chat("x", model="\udcff")),
    ("model", lambda client: client.model_info("\udcff")),
    ("adapter", lambda client: client.generate("x", adapter="\udcff")),
    ("model", lambda client: client.ready("\udcff")),
    ("prompt", lambda client: client.generate("\udcff")),
    ("prompt", lambda client: client.generate([2**40])),
    ("messages", lambda client: client.chat(BAD)),
    ("messages[0]", lambda client: client.chat([BAD])),
    ("messages[0]", lambda client: client.chat([{"role": "user", "content": "\udcff"}])),
    ("sampling.temperature", lambda client: client.generate("x", Sampling(temperature=10**400))),
    ("sampling.max_tokens", lambda client: client.generate("x", Sampling(max_tokens=2**40))),
    ("sampling.stop", lambda client: client.generate("x", Sampling(stop=[BAD]))),
    ("sampling.stop_token_ids", lambda client: client.generate("x", Sampling(stop_token_ids=[2**40]))),
]


@pytest.mark.parametrize(("field", "call"), MISFITS)
async def test_what_fits_into_no_message_is_refused_with_its_field(
    field: str, call: Callable[[Any], Any]
) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest) as caught:
        call(client)
    assert caught.value.field == field
    async with AsyncClient("127.0.0.1:1") as asynchronous:
        with pytest.raises(InvalidRequest) as caught:
            await call(asynchronous)
    assert caught.value.field == field


@pytest.mark.parametrize(("name", "value"), [("temperature", float("nan")), ("top_p", 1e300), ("top_k", -1)])
async def test_values_out_of_range(start_cluster: Start, name: str, value: Any) -> None:
    cluster = await start_cluster()
    async with AsyncClient(cluster.address) as client:
        with pytest.raises(InvalidRequest) as caught:
            await anext(client.generate("x", Sampling(**{name: value})))
    assert caught.value.field == f"sampling.{name}"


@pytest.mark.parametrize(
    ("address", "key"), [("\udcff", ""), ("", ""), ("127.0.0.1:1", "ü"), ("127.0.0.1:1", "a\n")]
)
def test_what_is_no_endpoint(address: str, key: str) -> None:
    with pytest.raises(ConfigError):
        Client(address, api_key=key)
