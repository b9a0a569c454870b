"""Rounding to int4 with regard to what comes into each matrix of a model while it reads text of its own.

The model is run as it is, on text that it draws itself, so that no data are needed and none are favoured. All of that text goes
through the layers as one step, and each matrix is rounded when its inputs arrive there; what it gives from then on is what
the rounded matrix gives, so that later ones make up for earlier ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.quant import QuantizedMatrix
from flm.kernels.rounding import round_compensated
from flm.worker.canonical import layer_prefix
from flm.worker.checkpoints.checkpoint import Checkpoint, TensorSource, open_checkpoint
from flm.worker.config import Span
from flm.worker.engine import Engine
from flm.worker.layers.attention import Attention
from flm.worker.layers.feed_forward import FeedForward
from flm.worker.plan import NewSequence, Scheduled, StepPlan
from flm.worker.request import SamplingParams
from flm.worker.tensors.precision import Precision, fuse
from flm.worker.tensors.tensor_source import Storage

SEQUENCES, TOKENS = 48, 256
FIRST = 8.0  # all tokens attend to the first: it counts as the square of this many
LONGEST = 2.0
LEAST_SHARE = 0.3
UNBOUNDED = 1 << 50  # the cache is as large as these sequences need
F32 = NDArray[np.float32]


class RoundedSource:
    """A checkpoint's tensors, some of them rounded already; the rounded ones are in memory."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.rounded: dict[str, QuantizedMatrix] = {}

    def names(self) -> Iterable[str]:
        return self._source.names()

    def has(self, name: str) -> bool:
        return self._source.has(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def storage(self, name: str) -> Storage:
        if name not in self.rounded:
            return self._source.storage(name)
        matrix = self.rounded[name]
        assert matrix.scales is not None
        scale_bits = 2 * matrix.scales.itemsize * 8 / matrix.group
        return Storage.of_groups("int4", "int4", matrix.group, matrix.nbytes, scale_bits)

    def matrix(self, name: str, rows: Span, cols: Span) -> QuantizedMatrix:
        if name not in self.rounded:
            return self._source.matrix(name, rows, cols)
        return self.rounded[name].slice_rows(rows.start, rows.stop).slice_cols(cols.start, cols.stop)

    def vector(self, name: str, span: Span) -> NDArray[np.float32]:
        return self._source.vector(name, span)

    def will_read(self, name: str, rows: Span, cols: Span) -> None:
        if name not in self.rounded:
            self._source.will_read(name, rows, cols)


class _Rounding:
    """Stands before a backend's `linear`: rounds a matrix when its inputs arrive, and goes on with the rounded one."""

    def __init__(
        self, backend: Any, checkpoint: Checkpoint, precision: Precision, first_T: NDArray[np.bool_]
    ) -> None:
        """first_T: which tokens of the step are the first of their text."""
        self.first_T = first_T
        self._linear, self._pack, self._precision = backend.linear, backend.pack, precision
        self.source = RoundedSource(checkpoint.source)
        self.checkpoint = replace(checkpoint, source=self.source)
        self.names: dict[int, list[str]] = {}  # id of a packed matrix → its parts' canonical names

    def __call__(self, x_TK: F32, weight: Any, *arguments: Any) -> None:
        names = self.names.get(id(weight), [])
        if names:
            moments = _moments(x_TK, self.first_T)
            for tensor in dict.fromkeys(self.checkpoint.recipes[name].tensor for name in names):
                self._round(tensor, moments)
            weight = self._pack(fuse([self.checkpoint.matrix(name) for name in names]))
        self._linear(x_TK, weight, *arguments)

    def _round(self, tensor: str, moments: F32) -> None:
        n, k = self.source.shape(tensor)
        values = self.source.matrix(tensor, Span(0, n), Span(0, k)).dequantize()
        self.source.rounded[tensor] = round_compensated(values, self._precision.group_for(k), moments)


def calibrated(path: Path, precision: Precision) -> Checkpoint:
    """The checkpoint at `path` with the attention's and the dense feed-forward part's matrices as int4; the others are as they
    were. Raises FlmError as Engine does."""
    context = min(TOKENS, open_checkpoint(path).config.max_position)
    options: dict[str, Any] = {"max_sequences": SEQUENCES, "max_context": context, "kv_bytes": UNBOUNDED}
    with Engine(path, **options) as engine:
        texts = _own_texts(engine)
    with Engine(path, max_step_tokens=SEQUENCES * context, capture=False, **options) as engine:
        rank = engine.ranks[0]
        first_T = np.concatenate([np.arange(len(text)) == 0 for text in texts])
        rounding = _Rounding(rank.backend, rank.checkpoint, precision, first_T)
        for number, layer in enumerate(rank.model.layers):
            rounding.names |= _matrices(layer, layer_prefix(number), rank.checkpoint)
        vars(rank.backend)["linear"] = rounding
        _read(engine, texts)
        return rounding.checkpoint


def _own_texts(engine: Engine) -> list[list[int]]:
    begin, draw = engine.config.bos_token_id, np.random.default_rng(0)
    first = draw.integers(engine.config.vocab, size=SEQUENCES) if begin is None else [begin] * SEQUENCES
    length = engine.max_context - 1
    params = [SamplingParams(length, seed=i + 1, ignore_eos=True) for i in range(SEQUENCES)]
    drawn = engine.generate([[int(token)] for token in first], params)
    whole = [[int(start), *text.token_ids] for start, text in zip(first, drawn, strict=True)]
    return [text[i % 2 :] for i, text in enumerate(whole)]  # half of them begin with a word


def _moments(x_TK: F32, first_T: NDArray[np.bool_]) -> F32:
    """Mean of x xᵀ, where the first tokens of texts count more. Inputs far longer than most, which some layers have, count as
    LONGEST times the median, and what is off the diagonal is taken back by a share, for few inputs say little of it."""
    length_T = np.sqrt((x_TK * x_TK).mean(axis=1))
    longest = LONGEST * max(float(np.median(length_T)), 1e-20)
    factor_T = np.minimum(1, longest / np.maximum(length_T, longest)) * np.where(first_T, FIRST, 1)
    x_TK = x_TK * factor_T[:, None].astype(np.float32)
    T, K = x_TK.shape
    moments = x_TK.T @ x_TK / np.float32(T)
    share = np.float32(max(LEAST_SHARE, K / (K + T)))
    diagonal = moments.diagonal().copy()
    moments *= 1 - share
    np.fill_diagonal(moments, diagonal)
    return moments


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


def _matrices(layer: Any, prefix: str, checkpoint: Checkpoint) -> dict[int, list[str]]:
    """id of a packed matrix → canonical names of its parts; those of latent attention and of experts are left out."""
    found: dict[int, list[str]] = {}
    if isinstance(layer.attention, Attention):
        found[id(layer.attention.qkv)] = [f"{prefix}self_attn.{name}_proj.weight" for name in "qkv"]
        found[id(layer.attention.output)] = [f"{prefix}self_attn.o_proj.weight"]
    if isinstance(layer.feed_forward, FeedForward):
        names = [f"{prefix}mlp.{name}_proj.weight" for name in ("gate", "up")]
        found[id(layer.feed_forward.gate_up)] = [name for name in names if checkpoint.has(name)]
        found[id(layer.feed_forward.down)] = [f"{prefix}mlp.down_proj.weight"]
    return found
