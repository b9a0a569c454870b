"""What comes into each matrix of a model while it writes text of its own: how much each input matters to a rounding.

The model is run as it is, on text that it draws itself, so that no data are needed and none are favoured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.worker.canonical import layer_prefix
from flm.worker.engine import Engine
from flm.worker.layers.attention import Attention
from flm.worker.layers.feed_forward import FeedForward
from flm.worker.request import SamplingParams

SEQUENCES, TOKENS = 16, 256
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


class _Listener:
    """Stands before a backend's `linear`, and adds up the squares of what comes in."""

    def __init__(self, backend: Any) -> None:
        self._linear = backend.linear
        self.sums: dict[int, F64] = {}

    def __call__(self, x_TK: F32, weight: Any, *arguments: Any) -> None:
        squares = np.square(x_TK).sum(axis=0, dtype=np.float64)
        self.sums[id(weight)] = self.sums.get(id(weight), 0) + squares
        self._linear(x_TK, weight, *arguments)


def input_weights(path: Path, sequences: int = SEQUENCES, tokens: int = TOKENS) -> dict[str, F32]:
    """Mean squares [K] of the inputs of the attention's and the dense feed-forward part's matrices, by canonical name.

    Raises FlmError as Engine does."""
    options: dict[str, Any] = {"max_sequences": sequences, "capture": False}
    with Engine(path, kv_bytes=1 << 31, **options) as engine:
        rank = engine.ranks[0]
        listener = _Listener(rank.backend)
        vars(rank.backend)["linear"] = listener
        begin, draw = engine.config.bos_token_id, np.random.default_rng(0)
        drawn = draw.integers(engine.config.vocab, size=sequences) if begin is None else [begin] * sequences
        prompts = [[int(token)] for token in drawn]
        length = min(tokens, engine.max_context - 1)
        engine.generate(
            prompts,
            [SamplingParams(max_tokens=length, temperature=1.0, seed=i + 1) for i in range(sequences)],
        )
        found: dict[str, F32] = {}
        for number, layer in enumerate(rank.model.layers):
            for name, weight in _matrices(layer, layer_prefix(number)).items():
                found[name] = listener.sums[id(weight)].astype(np.float32)
        return found


def _matrices(layer: Any, prefix: str) -> dict[str, Any]:
    """Canonical name → packed matrix; those of latent attention and of experts are left out."""
    found: dict[str, Any] = {}
    if isinstance(layer.attention, Attention):
        found |= {f"{prefix}self_attn.{name}_proj.weight": layer.attention.qkv for name in "qkv"}
        found[f"{prefix}self_attn.o_proj.weight"] = layer.attention.output
    if isinstance(layer.feed_forward, FeedForward):
        found |= {f"{prefix}mlp.{name}_proj.weight": layer.feed_forward.gate_up for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = layer.feed_forward.down
    return found
