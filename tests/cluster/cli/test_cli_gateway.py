"""generate, chat and bench as processes, against a gateway over fake replicas."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from flm.proto import flm_pb2, flm_pb2_grpc

PROMPT = "abc"
StartCluster = Callable[..., Awaitable[Any]]
RUN = "from flm.cluster.cli import main; main()"


@dataclass
class Ended:
    code: int
    out: str
    err: str


async def start(*arguments: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", RUN, *arguments, stdin=pipe, stdout=pipe, stderr=pipe
    )


async def run(*arguments: str, stdin: str = "") -> Ended:
    process = await start(*arguments)
    out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 90)
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


async def frames_of(address: str, **sampling: Any) -> list[flm_pb2.GenerateFrame]:
    """What the gateway answers to a plain stub."""
    request = flm_pb2.GenerateRequest(prompt=PROMPT, sampling=flm_pb2.SamplingOptions(**sampling))
    async with grpc.aio.insecure_channel(address) as channel:
        return [frame async for frame in flm_pb2_grpc.InferenceStub(channel).Generate(request)]


async def test_generate_streams_the_text(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    ended = await run("generate", PROMPT, "--seed", "7", "--address", cluster.address, "--stats")
    assert ended.code == 0, ended.err
    expected = "".join(frame.text for frame in await frames_of(cluster.address, seed=7))
    assert len(expected) > 20
    assert ended.out == expected + "\n"
    assert "tokens/s" in ended.err
    assert "3 prompt tokens" in ended.err


async def test_generate_reads_standard_input_and_prints_json(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    options = ("--json", "--max-tokens", "5", "--temperature", "0", "--address", cluster.address)
    ended = await run("generate", "-", "--adapter", "poet", *options, stdin=PROMPT)
    assert cluster.seats[0].replica.accepted[0].params.adapter == "poet"
    found = json.loads(ended.out)
    expected = [t for f in await frames_of(cluster.address, max_tokens=5, temperature=0) for t in f.token_ids]
    assert found["token_ids"] == expected
    assert len(expected) == 5
    assert (found["finish_reason"], found["prompt_tokens"], found["restarts"]) == ("length", 3, 0)


async def test_waiting_for_a_replica_is_said(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(0)
    cluster.gateway.set_routes("m", [], wanted=2)
    process = await start("generate", PROMPT, "--max-tokens", "3", "--address", cluster.address)
    assert process.stderr is not None
    said = await asyncio.wait_for(process.stderr.readline(), 90)
    assert said == b"0 of 2 replicas of m are ready\n"
    await cluster.add()
    out, _ = await asyncio.wait_for(process.communicate(), 90)
    assert (process.returncode, len(out) > 1) == (0, True)


async def test_errors_are_one_line_and_exit_1(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    wrong = (
        ("generate", PROMPT, "--model", "other"),
        ("generate", PROMPT, "--temperature", "nan"),
        ("generate", PROMPT, "--max-tokens", "-1"),
        ("generate", PROMPT, "--seed", "-1"),
        ("chat", "hi", "--model", "other"),
        ("bench", "--model", "other"),
    )
    for ended in await asyncio.gather(
        *(run(*arguments, "--address", cluster.address) for arguments in wrong)
    ):
        assert ended.code == 1, ended
        assert ended.err.startswith("error: "), ended
        assert ended.err.count("\n") == 1, ended


async def test_no_cluster_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    ended = await run("generate", PROMPT)
    assert ended.code == 1
    assert "flm-cluster up" in ended.err


async def test_interrupting_generate_cancels_the_request(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    replica = cluster.seats[0].replica
    replica.hold_after = 10
    process = await start("generate", PROMPT, "--address", cluster.address)
    assert process.stdout is not None
    await asyncio.wait_for(process.stdout.read(1), 90)
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    await cluster.settled()
    assert replica.cancelled


async def test_bench_counts_every_token(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    load = ("--concurrency", "3", "--requests", "6", "--prompt-tokens", "8", "--max-tokens", "10")
    ended = await run("bench", *load, "--json", "--address", cluster.address)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert (found["requests"], found["failed"], found["concurrency"]) == (6, 0, 3)
    assert (found["completion_tokens"], found["prompt_tokens"]) == (60, 48)
    assert found["time_to_first_token"]["p50"] > 0
    assert found["inter_token_latency"]["p99"] > 0
    table = await run("bench", *load, "--address", cluster.address)
    assert "time to first token" in table.out


async def test_a_conversation_remembers_what_was_said(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    ended = await run("chat", "--seed", "3", "--address", cluster.address, stdin="hello\nagain\n")
    assert ended.code == 0, ended.err
    first, second = (bytes(request.prompt_ids) for request in cluster.seats[0].replica.accepted)
    answer = ended.out.encode()[: len(second) // 4]
    assert b"hello" in first
    assert b"again" not in first
    assert second.index(b"hello") < second.index(answer) < second.index(b"again")


async def test_a_conversation_goes_on_after_an_error(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    ended = await run("chat", "--model", "other", "--address", cluster.address, stdin="hello\nagain\n")
    assert ended.code == 0
    assert ended.err.count("error: ") == 2
