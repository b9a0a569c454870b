"""`flm-cluster bench`: load on a gateway, and what its clients see."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flm.cluster.cli import gateway_options as options
from flm.cluster.cli.options import ClusterOption

if TYPE_CHECKING:
    from rich.table import Table

    from flm.cluster.client import AsyncStream, Sampling
    from flm.cluster.client.latency import Report, Sample
    from flm.cluster.client.request import Target


def bench(
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Streams at once.")] = 1,
    requests: Annotated[int, typer.Option("--requests", "-n", min=1, help="Requests in all.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, drawn at random.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 128,
    model: options.Model = "",
    as_json: options.AsJson = False,
    cluster: ClusterOption = "",
    address: options.Address = "",
    api_key: options.ApiKey = "",
    ca_file: options.CaFile = "",
) -> None:
    """Measure time to first token, inter-token latency and throughput. Prompts differ, so no prefix is cached."""
    from rich.console import Console

    from flm.cluster.client import Sampling

    target = options.gateway_target(cluster, address, api_key, ca_file)
    with options.gateway_client(target) as client:
        options.say_if_none_is_ready(client, model)
        vocab = client.model_info(model).vocab_size
    drawn = random.Random(0)
    prompts = [[drawn.randrange(vocab) for _ in range(prompt_tokens)] for _ in range(requests + 1)]
    sampling = Sampling(max_tokens, temperature=0, ignore_eos=True)
    report, errors = asyncio.run(_load(target, model, prompts, sampling, concurrency))
    if as_json:
        print(json.dumps(_without_nan(asdict(report)) | {"errors": errors}))
    else:
        Console().print(_table(report))
        for error, count in errors.items():
            print(f"{count} × {error}")
    if report.failed:
        raise typer.Exit(1)


async def _load(
    target: Target, model: str, prompts: list[list[int]], sampling: Sampling, concurrency: int
) -> tuple[Report, dict[str, int]]:
    """Send all prompts with that many streams at once; the first one alone before, and not counted."""
    from flm.cluster.client import AsyncClient
    from flm.cluster.client.latency import summarize
    from flm.worker.errors import FlmError

    errors: dict[str, int] = {}
    samples: list[Sample] = []
    queue = iter(prompts)
    async with AsyncClient(**vars(target)) as client:
        await _one(client.generate(next(queue), sampling, model=model))

        async def worker() -> None:
            for prompt in queue:
                try:
                    samples.append(await _one(client.generate(prompt, sampling, model=model)))
                except FlmError as error:
                    errors[str(error)] = errors.get(str(error), 0) + 1

        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        seconds = time.perf_counter() - began
    return summarize(samples, sum(errors.values()), concurrency, seconds), errors


async def _one(stream: AsyncStream) -> Sample:
    from flm.cluster.client.latency import Sample

    sent, arrivals, usage, restarts = time.perf_counter(), [], None, 0
    async for frame in stream:
        if frame.token_ids:
            arrivals.append((time.perf_counter(), len(frame.token_ids)))
        restarts = frame.restarts
        usage = frame.usage if frame.finish_reason else usage
    assert usage is not None, "the gateway ends every stream with its usage"
    return Sample(sent, tuple(arrivals), usage.completion_tokens, usage.prompt_tokens, restarts)


def _without_nan(value: Any) -> Any:
    """JSON knows no nan: what was not measured is null."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _table(report: Report) -> Table:
    from rich.table import Table

    title = (
        f"{report.requests} requests, {report.concurrency} at once, {report.seconds:.2f} s: "
        f"{report.tokens_per_second:,.1f} tokens/s, {report.failed} failed"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("milliseconds", "p50", "p90", "p99", "mean"):
        table.add_column(heading, justify="left" if heading == "milliseconds" else "right")
    rows = {
        "time to first token": report.time_to_first_token,
        "inter-token latency": report.inter_token_latency,
    }
    for name, found in rows.items():
        table.add_row(
            name, *(f"{1000 * value:.1f}" for value in (found.p50, found.p90, found.p99, found.mean))
        )
    return table
