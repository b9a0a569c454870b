"""Rounding to int4 with regard to what comes into each matrix of a model while it reads text of its own.

The model is run as it is, on text that it draws itself, so that no data are needed and none are favoured. Then it reads that
text twice in one step: once as it is, and once with each matrix rounded when its inputs arrive there, so that later matrices
make up for earlier ones, towards what the model gives as it is.

Shape legend: T tokens of the text, K inputs, N outputs, E hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flm.worker.canonical import layer_prefix
from flm.worker.checkpoints.checkpoint import Checkpoint, open_checkpoint
from flm.worker.conversion.matrix_rounding import MatrixRounding
from flm.worker.engine import Engine
from flm.worker.layers.attention import Attention
from flm.worker.layers.experts import Experts
from flm.worker.layers.feed_forward import FeedForward
from flm.worker.layers.latent_attention import LatentAttention
from flm.worker.layers.recurrence import TimeMix
from flm.worker.plan import NewSequence, Scheduled, StepPlan
from flm.worker.request import SamplingParams
from flm.worker.tensors.precision import Precision

SEQUENCES, TOKENS = 48, 256
UNBOUNDED = 1 << 50  # the cache is as large as these sequences need
DRAWN = 0.2  # of the whole work


class _Reading:
    """Stands before the ops of a backend that multiply with matrices. The first half of a step's tokens go through them as they
    are, the second half through what they are rounded to."""

    def __init__(self, rank: Any, rounding: MatrixRounding) -> None:
        self._linear, self._expert_mlp = rank.backend.linear, getattr(rank.backend, "expert_mlp", None)
        self._pack, self._model, self._rounding = rank.backend.pack, rank.model, rounding
        # id of a packed matrix → its parts' canonical names, and whether what it gives is added to the residual as it is
        self.matrices: dict[int, tuple[list[str], bool]] = {}
        self.experts: dict[int, str] = {}  # id of a layer's packed experts → what their names begin with
        for number, layer in enumerate(rank.model.layers):
            self._find(layer, layer_prefix(number), rank.checkpoint)
        vars(rank.backend).update(linear=self.linear)
        if self._expert_mlp is not None:
            vars(rank.backend).update(expert_mlp=self.expert_mlp)

    def linear(self, x_TK: Any, weight: Any, out_TN: Any, *bias: Any) -> None:
        names, adds = self.matrices.get(id(weight), ([], False))
        half = len(x_TK) // 2
        if not names:
            self._linear(x_TK, weight, out_TN, *bias)
            return
        behind = None
        if adds:
            residual_TE = self._model.residual(2 * half)
            behind = residual_TE[:half] - residual_TE[half:]
        rounded = self._rounding.linear(names, x_TK[:half], x_TK[half:], behind)
        self._linear(x_TK[:half], weight, out_TN[:half], *bias)
        self._linear(x_TK[half:], self._pack(rounded), out_TN[half:], *bias)

    def expert_mlp(
        self, x_TE: Any, experts: Any, ids_TK: Any, weights_TK: Any, out_TE: Any, accumulate: bool = False
    ) -> None:
        half, prefix = len(x_TE) // 2, self.experts[id(experts)]
        assert self._expert_mlp is not None
        self._expert_mlp(x_TE[:half], experts, ids_TK[:half], weights_TK[:half], out_TE[:half], accumulate)
        if not accumulate:
            out_TE[half:] = 0
        for expert in range(experts.count):
            rows, place = np.nonzero(ids_TK[half:] == expert)
            answers = self._rounding.expert(f"{prefix}experts.{expert}.", x_TE[:half], x_TE[half:], rows)
            out_TE[half + rows] += answers * weights_TK[half + rows, place, None]

    def _find(self, layer: Any, prefix: str, checkpoint: Checkpoint) -> None:
        """The matrices that are rounded; routers, and what latent attention expands latents with, stay."""
        config = checkpoint.config
        adds = (
            layer.outer_norms is None and not config.feed_forward.parallel and not config.norm.residual_factor
        )
        attention, mlp = layer.attention, layer.feed_forward
        if isinstance(attention, Attention):
            self._add(attention.qkv, f"{prefix}self_attn.", ("q_proj", "k_proj", "v_proj"), checkpoint)
        elif isinstance(attention, LatentAttention):
            for matrix, name in ((attention.query_a, "q_a_proj"), (attention.query, "q_proj"), (attention.latent, "kv_a_proj")):  # fmt: skip
                self._add(matrix, f"{prefix}self_attn.", (name,), checkpoint)
        if isinstance(attention, Attention | LatentAttention):
            self._add(attention.output, f"{prefix}self_attn.", ("o_proj",), checkpoint, adds)
        if isinstance(mlp, Experts):
            self.experts[id(mlp.experts)] = f"{prefix}mlp."
            mlp, prefix, adds = mlp.shared, f"{prefix}mlp.shared.", False
        else:
            prefix = f"{prefix}mlp."
        if isinstance(mlp, FeedForward):
            self._add(mlp.gate_up, prefix, ("gate_proj", "up_proj"), checkpoint)
            self._add(mlp.down, prefix, ("down_proj",), checkpoint, adds)

    def _add(
        self, matrix: Any, prefix: str, parts: tuple[str, ...], checkpoint: Checkpoint, adds: bool = False
    ) -> None:
        names = [f"{prefix}{part}.weight" for part in parts]
        self.matrices[id(matrix)] = [name for name in names if checkpoint.has(name)], adds


def calibrated(path: Path, precision: Precision, on_progress: Callable[[float], None]) -> Checkpoint:
    """The checkpoint at `path` with the matrices of its layers as int4; the others are as they were. on_progress gets 0 to 1.
    Raises FlmError as Engine does."""
    context = min(TOKENS, open_checkpoint(path).config.max_position)
    options: dict[str, Any] = {"max_context": context, "kv_bytes": UNBOUNDED}
    with Engine(path, max_sequences=SEQUENCES, **options) as engine:
        texts = _own_texts(engine)
    on_progress(DRAWN)
    tokens = 2 * sum(map(len, texts))
    with Engine(
        path, max_sequences=2 * SEQUENCES, max_step_tokens=tokens, capture=False, **options
    ) as engine:
        rank = engine.ranks[0]
        layers = rank.model.layers
        if not isinstance(layers[0].attention, TimeMix):
            # one for all of them: what a layer reads, the same step has written
            cache: Any = layers[0].attention.cache
            rank.model.set_caches([cache] * len(layers))
        first_T = np.concatenate([np.arange(len(text)) == 0 for text in texts])
        report = lambda fraction: on_progress(DRAWN + (1 - DRAWN) * fraction)
        rounding = MatrixRounding(rank.checkpoint, precision, first_T, report)
        _Reading(rank, rounding)
        _read(engine, texts + texts)
        return rounding.checkpoint


def _own_texts(engine: Engine) -> list[list[int]]:
    begin, draw = engine.config.bos_token_id, np.random.default_rng(0)
    first = draw.integers(engine.config.vocab, size=SEQUENCES) if begin is None else [begin] * SEQUENCES
    length = engine.max_context - 1
    params = [SamplingParams(length, seed=i + 1, ignore_eos=True) for i in range(SEQUENCES)]
    drawn = engine.generate([[int(token)] for token in first], params)
    whole = [[int(start), *text.token_ids] for start, text in zip(first, drawn, strict=True)]
    return [text[i % 2 :] for i, text in enumerate(whole)]  # half of them begin with a word


def _read(engine: Engine, texts: list[list[int]]) -> None:
    """All texts as one step."""
    runner, size = engine.ranks[0].runner, engine.spec.block_size
    counts = [-(-len(text) // size) for text in texts]
    with engine.replica.borrow_blocks(sum(counts)) as blocks:
        ends = np.cumsum(counts).tolist()
        new = [
            NewSequence(slot, text, len(text), 0, blocks[end - count : end], SamplingParams())
            for slot, (text, count, end) in enumerate(zip(texts, counts, ends, strict=True))
        ]
        runner.run(
            StepPlan(0, new, [Scheduled(s, 0, len(text), sample=False) for s, text in enumerate(texts)], [])
        )
