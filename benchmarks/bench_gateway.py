"""What Ray, the gateway and gRPC cost on top of the engine; prints one JSON object, adds a row to RESULTS.md.

Usage: python benchmarks/bench_gateway.py [--rounds N] [--port P] [--no-record]

  up_seconds           `flm-cluster up` of deploy/demo.yaml's model, to its return with everything ready (warm caches)
  memory_mib           of all the cluster's processes after the runs, shared pages counted once (PSS)
  gateway_16, engine_16  tokens/s of 16 streams of 128 tokens, through the gateway and in the engine alone
  ttft_added_ms        median time to first token of an 8-token prompt, one at a time, gateway minus engine
The cluster idles while the engine runs, and the engine is closed while the cluster runs; they take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml
from bench_engine import BATCH, NEW, SHORT, greedy, prompt_ids
from results_table import add_row

from flm.cluster.client import AsyncClient, Client, Sampling
from flm.cluster.settings.config import load_config
from flm.cluster.state import find_endpoint
from flm.worker import Engine

DEMO = Path(__file__).resolve().parent.parent / "deploy" / "demo.yaml"
NAME = "bench-gateway"
SECTION = "Cluster around the engine"  # of RESULTS.md
TRIALS = 20
COMMAND = [sys.executable, "-c", "from flm.cluster.cli import main; main()"]


def write_config(folder: Path, port: int) -> Path:
    config = yaml.safe_load(DEMO.read_text())
    config |= {
        "name": NAME,
        "gateway": {"listen": f"127.0.0.1:{port}"},
        "admin": {"listen": f"127.0.0.1:{port + 1}"},
    }
    file = folder / "bench.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def engine_round(seed: int) -> tuple[float, float]:
    """Tokens/s of the batch, and the median time to first token in seconds, in this process."""
    model = load_config(DEMO).models[0]
    options = {"max_context": model.max_context, "kv_bytes": model.kv_cache.memory}
    firsts = []
    with Engine(model.path, **options) as engine:
        engine.generate([prompt_ids(SHORT, seed)] * 2, greedy(NEW))
        start = time.perf_counter()
        engine.generate([prompt_ids(SHORT, seed + 100 + i) for i in range(BATCH)], greedy(NEW))
        speed = BATCH * NEW / (time.perf_counter() - start)
        for i in range(TRIALS):
            start = time.perf_counter()
            for _ in engine.stream(prompt_ids(SHORT, seed + 200 + i), greedy(1)):
                firsts.append(time.perf_counter() - start)
    return speed, statistics.median(firsts)


def gateway_round(address: str, seed: int) -> tuple[float, float]:
    """The same through the gateway."""
    firsts = []
    with Client(address) as client:
        list(client.generate(prompt_ids(SHORT, seed), Sampling(NEW, 0, ignore_eos=True)))
        speed = asyncio.run(_streams(address, seed))
        for i in range(TRIALS):
            start = time.perf_counter()
            stream = client.generate(prompt_ids(SHORT, seed + 200 + i), Sampling(1, 0, ignore_eos=True))
            next(frame for frame in stream if frame.token_ids)
            firsts.append(time.perf_counter() - start)
    return speed, statistics.median(firsts)


async def _streams(address: str, seed: int) -> float:
    async with AsyncClient(address) as client:

        async def one(i: int) -> int:
            stream = client.generate(prompt_ids(SHORT, seed + 100 + i), Sampling(NEW, 0, ignore_eos=True))
            return sum([len(frame.token_ids) async for frame in stream])

        start = time.perf_counter()
        counts = await asyncio.gather(*(one(i) for i in range(BATCH)))
        if counts != [NEW] * BATCH:
            raise SystemExit(f"expected {NEW} tokens of each stream, got {counts}")
        return BATCH * NEW / (time.perf_counter() - start)


def cluster_memory(session: int) -> float:
    """MiB of every process in the Ray head's session."""
    total = 0
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session:
                total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            continue  # it ended meanwhile
    return total / 2**20


def in_turns(address: str, rounds: int) -> dict[str, float]:
    pairs = [(engine_round(1000 * r), gateway_round(address, 1000 * r)) for r in range(rounds)]
    engine, gateway = ([pair[i] for pair in pairs] for i in (0, 1))
    speeds = [statistics.median(speed for speed, _ in found) for found in (engine, gateway)]
    firsts = [statistics.median(first for _, first in found) for found in (engine, gateway)]
    return {
        "engine_16": speeds[0],
        "gateway_16": speeds[1],
        "gateway_share": speeds[1] / speeds[0],
        "engine_ttft_ms": 1000 * firsts[0],
        "gateway_ttft_ms": 1000 * firsts[1],
        "ttft_added_ms": 1000 * (firsts[1] - firsts[0]),
    }


def cells(figures: dict[str, float]) -> list[str]:
    """The row's cells after date and hardware."""
    formats = {
        "engine_16": ".0f",
        "gateway_16": ".0f",
        "gateway_share": ".2f",
        "ttft_added_ms": ".1f",
        "up_seconds": ".1f",
        "memory_mib": ".0f",
    }
    return [format(figures[name], form) for name, form in formats.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=50851, help="of the gateway; the next one is the admin's")
    parser.add_argument("--no-record", action="store_true", help="leave RESULTS.md as it is")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = write_config(Path(folder), args.port)
        start = time.perf_counter()
        subprocess.run([*COMMAND, "up", str(file), "--detach"], check=True, stdout=sys.stderr)
        figures = {"up_seconds": time.perf_counter() - start}
        try:
            endpoint = find_endpoint(NAME)
            figures |= in_turns(endpoint.gateway, args.rounds)
            figures["memory_mib"] = cluster_memory(endpoint.head_session)
        finally:
            subprocess.run([*COMMAND, "down", "--cluster", NAME], check=True, stdout=sys.stderr)
    print(json.dumps(figures))
    if not args.no_record:
        add_row(SECTION, *cells(figures))


if __name__ == "__main__":
    main()
