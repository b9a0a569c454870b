"""Streams of one leader on a GPU: the engine's own scheduler, loop, runner and layers, with random weights made there.

Shape legend: M streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gpu_dummy import DummyBackend, ShapedWeights
from leader_loop import DRAWN, GREEDY, STEPS, decode_rate

from flm.worker.communication.comm import LocalCommunicator
from flm.worker.config import ModelConfig
from flm.worker.execution.caches import make_caches
from flm.worker.execution.model import Decoder


def engine_rows(
    backend: DummyBackend, model: ModelConfig, M: int, steps: int = STEPS
) -> Iterator[dict[str, Any]]:
    """Tokens per second step by step and ahead, of greedy rows and of drawn ones with penalties."""
    weights: Any = ShapedWeights(model)
    context = steps + 16
    blocks = M * -(-context // 16)
    caches = make_caches(backend, weights.shard, blocks, 16, backend.activation, M)
    decoder = Decoder(weights, backend, LocalCommunicator(), caches, context, M, M)
    for drawn, params in (("greedy", GREEDY), ("drawn, penalties", DRAWN)):
        asked = replace(params, max_tokens=steps)
        for ahead in (0, 1):
            yield {
                "what": f"{model.family} served, {M} streams, {drawn}, {'ahead' if ahead else 'step by step'}",
                "tokens_per_second": decode_rate(decoder, backend, M, context, ahead, asked),
                "format": backend.format,
            }
