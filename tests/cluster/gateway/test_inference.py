"""What clients ask and get, over real gRPC on loopback, from replicas that compute by arithmetic."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from fake_cluster import KEY, MAX_CONTEXT, MODEL, FakeCluster

from flm.cluster.client import AsyncClient, Sampling
from flm.cluster.gateway.gateway import Gateway, ServedModel
from flm.cluster.gateway.inference import MAX_TEXT
from flm.cluster.prompts import rendering
from flm.cluster.prompts.templates import ChatTemplate
from flm.proto import flm_pb2, flm_pb2_grpc
from flm.worker.errors import (
    InvalidRequest,
    ModelNotFound,
    Overloaded,
)

Start = Callable[..., Awaitable[Any]]
CORPUS = "Grüße aus Köln! 世界 is wide — 😀 and «more» to say; żółw, naïve café.\n"
EOS = 256


def texts_and_tokens(frames: list[flm_pb2.GenerateFrame]) -> tuple[str, list[int]]:
    return "".join(f.text for f in frames), [t for f in frames for t in f.token_ids]


async def test_generate(start_cluster: Start, expected: Callable[..., list[int]]) -> None:
    cluster = await start_cluster()
    async with AsyncClient(cluster.address) as client:
        frames = [f async for f in client.generate("hello", Sampling(seed=3, request_id="mine"))]
    text, tokens = texts_and_tokens(frames)
    wanted = expected(b"hello", 3)
    assert [*tokens, EOS] == wanted
    assert text == bytes(wanted[:-1]).decode(errors="replace")
    assert [f.sequence for f in frames] == list(range(len(frames)))
    assert {(f.request_id, f.index, f.restarts) for f in frames} == {("mine", 0, 0)}
    assert all(not f.finish_reason and not f.HasField("usage") for f in frames[:-1])
    last = frames[-1]
    assert last.finish_reason == flm_pb2.FINISH_REASON_STOP
    assert last.stop_token_id == EOS
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (5, len(wanted))
    assert (last.timings.queue, last.timings.prefill, last.timings.decode) == (0.001, 0.002, 0.003)
    await cluster.settled()


async def test_max_tokens_and_logprobs(start_cluster: Start) -> None:
    cluster = await start_cluster()
    async with AsyncClient(cluster.address) as client:
        frames = [f async for f in client.generate("x", Sampling(seed=1, max_tokens=5, logprobs=2))]
    entries = [e for f in frames for e in f.logprobs]
    assert [e.token_id for e in entries] == texts_and_tokens(frames)[1]
    assert len(entries) == 5
    assert [(top.token_id, top.text) for top in entries[0].top] == [(65, "A"), (66, "B")]
    assert all(len(e.text) == 1 for e in entries)
    assert frames[-1].finish_reason == flm_pb2.FINISH_REASON_LENGTH


async def test_stop_string_across_tokens(start_cluster: Start) -> None:
    cluster = await start_cluster()
    greedy = Sampling(temperature=0, stop=["never", " 世界 "])
    async with AsyncClient(cluster.address) as client:
        prompt = next(p for p in map(str, range(1000)) if _meets(p, " 世界 "))
        frames = [f async for f in client.generate(prompt, greedy)]
    text, tokens = texts_and_tokens(frames)
    assert bytes(tokens).endswith(" 世界 ".encode())
    assert text == bytes(tokens)[: -len(" 世界 ".encode())].decode(errors="replace")
    assert frames[-1].stop_string == " 世界 "
    assert frames[-1].finish_reason == flm_pb2.FINISH_REASON_STOP
    assert frames[-1].usage.completion_tokens == len(tokens)
    timings = frames[-1].timings
    assert 0 < timings.prefill < 0.0021  # at most what the replica says: its queue is no prefill
    assert timings.decode > 0
    await cluster.settled()
    assert len(cluster.seats[0].replica.cancelled) == 1


async def test_waiting_for_a_replica_is_queueing(start_cluster: Start) -> None:
    cluster = await start_cluster(0)
    prompt = next(p for p in map(str, range(1000)) if _meets(p, " 世界 "))

    async def generate() -> list[flm_pb2.GenerateFrame]:
        async with AsyncClient(cluster.address) as client:
            return [f async for f in client.generate(prompt, Sampling(temperature=0, stop=[" 世界 "]))]

    running = asyncio.create_task(generate())
    while not cluster.waiting_or_served():
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.3)
    await cluster.add()
    timings = (await running)[-1].timings
    assert timings.queue > 0.2
    assert 0 < timings.prefill < 0.2


def _meets(prompt: str, stop: str) -> bool:
    """Whether the fake model says `stop` early on, after a few whole characters."""
    import zlib

    data = CORPUS.encode()
    start = zlib.crc32(prompt.encode()) % len(data)
    return 5 < (data * 2).find(stop.encode(), start) - start < 25 and data[start] < 128


async def test_n_streams_with_echo(start_cluster: Start, expected: Callable[..., list[int]]) -> None:
    cluster = await start_cluster()
    async with AsyncClient(cluster.address) as client:
        frames = [f async for f in client.generate("abc", Sampling(seed=5, n=3, echo=True))]
    by_index = [[f for f in frames if f.index == i] for i in range(3)]
    outputs = [texts_and_tokens(own) for own in by_index]
    assert [*outputs[0][1], EOS] == expected(b"abc", 5)
    assert len({tuple(tokens) for _, tokens in outputs}) == 3
    for own, (text, _) in zip(by_index, outputs, strict=True):
        assert text.startswith("abc")
        assert [f.sequence for f in own] == list(range(len(own)))
        assert [bool(f.finish_reason) for f in own] == [False] * (len(own) - 1) + [True]
    await cluster.settled()


async def test_chat_goes_through_the_template(start_cluster: Start) -> None:
    cluster = await start_cluster()
    async with AsyncClient(cluster.address) as client:
        assert [text async for text in client.chat("hi", Sampling(max_tokens=3)).texts()]
    ids = cluster.seats[0].replica.accepted[0].prompt_ids
    assert bytes(ids) == b"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


async def test_a_slow_template_holds_up_only_its_own_models_conversations(
    start_cluster: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await start_cluster()
    begun, go_on = threading.Event(), threading.Event()

    def slow(template: ChatTemplate, messages: Any) -> str:
        begun.set()
        assert go_on.wait(60)
        return "".join(message["content"] for message in messages)

    monkeypatch.setattr(ChatTemplate, "render", slow)
    monkeypatch.setattr(rendering, "MAX_WAITING", 1)
    async with AsyncClient(cluster.address) as client:
        chat = asyncio.ensure_future(_texts(client.chat("abc", Sampling(max_tokens=3, seed=1))))
        while not begun.is_set():
            await asyncio.sleep(0.005)
        generated = await _texts(client.generate("abc", Sampling(max_tokens=3, seed=1)))
        with pytest.raises(Overloaded, match="1 conversations wait for the chat template of 'm'"):
            await _texts(client.chat("other"))
        go_on.set()
        assert await chat == generated != []


async def _texts(stream: Any) -> list[str]:
    return [text async for text in stream.texts()]


async def test_the_checkpoints_defaults_of_sampling_reach_replicas(tokenizer: Any, tmp_path: Path) -> None:
    shutil.copy(Path(MODEL) / "config.json", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 7}')
    gateway = Gateway(
        [ServedModel("m", str(tmp_path), MAX_CONTEXT)],
        "127.0.0.1:0",
        load=lambda path: tokenizer,
        replica_key=KEY,
    )
    cluster = FakeCluster(gateway, await gateway.start())
    try:
        replica = (await cluster.add()).replica
        async with AsyncClient(cluster.address) as client:
            await _texts(client.generate("x", Sampling(max_tokens=1)))
            await _texts(client.chat("x", Sampling(max_tokens=1, temperature=1.0)))
        assert [(r.params.temperature, r.params.top_k) for r in replica.accepted] == [(0.5, 7), (1.0, 7)]
    finally:
        await cluster.close()


async def test_messages_cannot_end_a_text(start_cluster: Start) -> None:
    cluster = await start_cluster()
    async with AsyncClient(cluster.address) as client:
        assert [text async for text in client.chat("a<eos>b", Sampling(max_tokens=3)).texts()]
    ids = cluster.seats[0].replica.accepted[0].prompt_ids
    assert bytes(ids) == b"<|im_start|>user\na<eos>b<|im_end|>\n<|im_start|>assistant\n"


async def test_what_cannot_fit_is_refused_before_it_is_tokenised(
    start_cluster: Start, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await start_cluster()
    monkeypatch.setattr(type(tokenizer), "encode", None)
    async with AsyncClient(cluster.address) as client:
        for call in (client.generate, client.chat):
            with pytest.raises(
                InvalidRequest, match=r"prompt: .* bytes cannot fit into a context of 512 tokens"
            ):
                await anext(call("x" * 100_000))


async def test_options_reach_the_replica(start_cluster: Start) -> None:
    cluster = await start_cluster()
    sampling = Sampling(
        max_tokens=2, top_k=3, min_p=0.5, priority=7, cache_salt="s", stop_token_ids=[9], seed=1
    )
    async with AsyncClient(cluster.address) as client:
        assert [f async for f in client.generate([1, 2], sampling)]
    request = cluster.seats[0].replica.accepted[0]
    assert (request.prompt_ids, request.priority, request.cache_salt) == ((1, 2), 7, "s")
    assert (request.params.top_k, request.params.min_p, request.params.stop_token_ids) == (3, 0.5, (9, EOS))


async def test_unary_methods(start_cluster: Start) -> None:
    cluster = await start_cluster()
    async with AsyncClient(cluster.address) as client:
        ids = await client.tokenize("naïve")
        assert bytes(ids).decode() == "naïve"
        assert await client.detokenize([*ids, EOS]) == "naïve"
        assert await client.detokenize([*ids, EOS], skip_special_tokens=False) == "naïve<eos>"
        (info,) = await client.models()
        assert info == await client.model_info("m")
        assert (info.name, info.max_context, info.vocab_size, info.architecture) == ("m", 512, 257, "llama")
        assert (info.ready_replicas, info.wanted_replicas, list(info.eos_token_ids)) == (1, 1, [EOS])
        with pytest.raises(InvalidRequest, match="ids: expected token ids from 0 to 256"):
            await client.detokenize([257])


async def test_texts_without_end_are_refused_before_any_work(
    start_cluster: Start, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await start_cluster()
    longest = MAX_TEXT // 2 * "ä"
    async with AsyncClient(cluster.address) as client:
        assert await client.detokenize(await client.tokenize(longest)) == longest
        monkeypatch.setattr(type(tokenizer), "encode", None)
        monkeypatch.setattr(type(tokenizer), "decode", None)
        with pytest.raises(InvalidRequest, match="text: expected at most 1048576 bytes, got 1048577"):
            await client.tokenize(longest + "x")
        with pytest.raises(InvalidRequest, match="ids: expected at most 1048576 token ids, got 1048577"):
            await client.detokenize([1] * (MAX_TEXT + 1))


@pytest.mark.parametrize(
    ("request_", "status", "field"),
    [
        (flm_pb2.GenerateRequest(model="gpt", prompt="x"), "NOT_FOUND", ""),
        (flm_pb2.GenerateRequest(), "INVALID_ARGUMENT", "prompt"),
        (flm_pb2.GenerateRequest(prompt=""), "INVALID_ARGUMENT", "prompt"),
        (flm_pb2.GenerateRequest(prompt="x" * 512), "INVALID_ARGUMENT", "prompt"),
        (flm_pb2.GenerateRequest(prompt_ids={"ids": [1, 300]}), "INVALID_ARGUMENT", "prompt_ids.ids"),
        (
            flm_pb2.GenerateRequest(prompt="x", sampling={"max_tokens": -1}),
            "INVALID_ARGUMENT",
            "sampling.max_tokens",
        ),
        (
            flm_pb2.GenerateRequest(prompt="x", sampling={"temperature": float("nan")}),
            "INVALID_ARGUMENT",
            "sampling.temperature",
        ),
        (
            flm_pb2.GenerateRequest(prompt="x", sampling={"stop": [b"\xff"]}),
            "INVALID_ARGUMENT",
            "sampling.stop[0]",
        ),
        (flm_pb2.ChatRequest(), "INVALID_ARGUMENT", "messages"),
        (
            flm_pb2.ChatRequest(messages=[{"role": "cat", "content": ""}]),
            "INVALID_ARGUMENT",
            "messages[0].role",
        ),
    ],
)
async def test_refusals(start_cluster: Start, request_: Any, status: str, field: str) -> None:
    cluster = await start_cluster()
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stub = flm_pb2_grpc.InferenceStub(channel)
        method = stub.Chat if isinstance(request_, flm_pb2.ChatRequest) else stub.Generate
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(request_).read()
    assert caught.value.code().name == status
    from flm.cluster.wire.grpc_errors import from_rpc_error

    assert getattr(from_rpc_error(caught.value), "field", "") == field
    assert cluster.seats[0].replica.accepted == []
    assert cluster.waiting_or_served() == 0


async def test_unknown_model_names_those_served(start_cluster: Start) -> None:
    cluster = await start_cluster()
    async with AsyncClient(cluster.address) as client:
        with pytest.raises(ModelNotFound, match="'gpt' is not served here; served models: m"):
            await client.model_info("gpt")
