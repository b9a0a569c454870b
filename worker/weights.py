"""The weights of one rank: its slices of every matrix, fused and in the wanted precision.

Shape legend: N rows (outputs), K columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import lcm

import numpy as np
from numpy.typing import NDArray

from flm.kernels.quant import QuantizedMatrix
from flm.worker.checkpoint import Checkpoint
from flm.worker.config import ShardSpec, Span
from flm.worker.errors import ConfigError
from flm.worker.families.llama import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix
from flm.worker.precision import (
    DEFAULT_GROUP,
    SMALL_GROUP,
    check_quantization,
    convert,
    fuse,
    regroup,
    row_pieces,
    target_format,
)
from flm.worker.tensor_source import stack_rows

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class LayerWeights:
    """One layer's shard. Biases of row-parallel matrices (output, down) are added by rank 0 alone; biases are None
    where the model has none."""

    input_norm: Vector
    qkv: QuantizedMatrix  # rows: this rank's q, then k, then v heads
    qkv_bias: Vector | None
    output: QuantizedMatrix  # columns: this rank's q heads
    output_bias: Vector | None
    post_norm: Vector
    gate_up: QuantizedMatrix  # rows: gate, then up
    gate_up_bias: Vector | None
    down: QuantizedMatrix
    down_bias: Vector | None


class ModelWeights:
    """One rank's weights, read when asked for, so that a caller who packs each one at once never holds a second
    copy of the shard. Every access reads anew. on_progress gets the fraction of weights read so far, 0 to 1."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        shard: ShardSpec,
        quantization: str,
        on_progress: Callable[[float], None],
    ) -> None:
        self._checkpoint, self._shard, self._quantization = checkpoint, shard, quantization
        self._on_progress, self._read = on_progress, 0
        self._group = _group_for(shard.model.head_dim)

    @property
    def embedding(self) -> QuantizedMatrix:
        """This rank's rows of the vocabulary."""
        return self._matrix(EMBEDDING, self._shard.vocab)

    @property
    def lm_head(self) -> QuantizedMatrix | None:
        """This rank's rows of the vocabulary; None where the embedding serves as the head."""
        return None if self._shard.model.tie_embeddings else self._matrix(LM_HEAD, self._shard.vocab)

    @property
    def final_norm(self) -> Vector:
        return self._checkpoint.vector(FINAL_NORM)

    @property
    def layers(self) -> Iterator[LayerWeights]:
        """The layers in order; keep none longer than needed."""
        for layer in range(self._shard.model.layers):
            yield self._layer(layer_prefix(layer))
            self._checkpoint.drop_pages()

    def _layer(self, prefix: str) -> LayerWeights:
        s = self._shard
        q, kv, ffn = s.q_rows, s.kv_rows, s.intermediate
        attention = [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)]
        mlp = [("mlp.gate_proj", ffn), ("mlp.up_proj", ffn)]
        hidden = Span(0, s.model.hidden)
        once = s.tp_rank == 0  # the sum over ranks must hold such a bias once
        return LayerWeights(
            input_norm=self._checkpoint.vector(prefix + "input_layernorm.weight"),
            qkv=fuse([self._matrix(f"{prefix}{name}.weight", rows) for name, rows in attention]),
            qkv_bias=self._bias(prefix, attention, s.model.attention_bias),
            output=self._matrix(prefix + "self_attn.o_proj.weight", None, q),
            output_bias=self._bias(prefix, [("self_attn.o_proj", hidden)], s.model.output_bias and once),
            post_norm=self._checkpoint.vector(prefix + "post_attention_layernorm.weight"),
            gate_up=fuse([self._matrix(f"{prefix}{name}.weight", rows) for name, rows in mlp]),
            gate_up_bias=self._bias(prefix, mlp, s.model.mlp_bias),
            down=self._matrix(prefix + "mlp.down_proj.weight", None, ffn),
            down_bias=self._bias(prefix, [("mlp.down_proj", hidden)], s.model.mlp_bias and once),
        )

    def _bias(self, prefix: str, parts: list[tuple[str, Span]], wanted: bool) -> Vector | None:
        if not wanted:
            return None
        return np.concatenate([self._checkpoint.vector(f"{prefix}{name}.bias", span) for name, span in parts])

    def _matrix(self, name: str, rows: Span | None, cols: Span | None = None) -> QuantizedMatrix:
        n, k = self._checkpoint.shape(name)
        rows, cols = rows or Span(0, n), cols or Span(0, k)
        stored = self._checkpoint.storage(name)
        wanted = _wanted_format(name, stored.format, self._quantization)
        if wanted == stored.format:
            matrix = self._slice(name, rows, cols)
        else:
            pieces = (
                convert(self._slice(name, Span(rows.start + a, rows.start + b), cols), wanted, self._group)
                for a, b in row_pieces(rows.size, cols.size)
            )
            matrix = stack_rows(pieces, rows.size)
        self._read += rows.size * cols.size
        self._on_progress(min(self._read / self._total, 1.0))
        return matrix

    def _slice(self, name: str, rows: Span, cols: Span) -> QuantizedMatrix:
        """Columns as asked, in smaller groups where they begin or end within a group as it is stored."""
        k, group = self._checkpoint.shape(name)[1], self._checkpoint.storage(name).group
        if not group or _on_border(cols, group, k):
            return self._checkpoint.matrix(name, rows, cols)
        outer = Span(cols.start // group * group, min(-(-cols.stop // group) * group, k))
        small = regroup(self._checkpoint.matrix(name, rows, outer), SMALL_GROUP)
        return small.slice_cols(cols.start - outer.start, cols.stop - outer.start)

    @cached_property
    def _total(self) -> int:
        """Weights of this shard."""
        s, m = self._shard, self._shard.model
        layer = s.q_rows.size * 2 + s.kv_rows.size * 2 + s.intermediate.size * 3
        return m.hidden * (layer * m.layers + s.vocab.size * (1 if m.tie_embeddings else 2))


def load_weights(
    checkpoint: Checkpoint, shard: ShardSpec, quantization: str, on_progress: Callable[[float], None]
) -> ModelWeights:
    """This rank's weights, read lazily. quantization "auto" keeps the checkpoint's precision; "int8", "int4", "bf16",
    "fp16" and "fp32" convert. "int4" keeps the embedding and the LM head in int8, where four bits cost the most.
    Raises ConfigError for another name."""
    check_quantization(quantization)
    return ModelWeights(checkpoint, shard, quantization, on_progress)


def shard_spec(checkpoint: Checkpoint, tp_size: int, tp_rank: int, quantization: str) -> ShardSpec:
    """The shard of one rank, with its splits on the borders of the groups that the weights will have.

    Raises ConfigError where some rank would have no heads, no part of the MLP or no vocabulary, or where
    quantised weights cannot be cut between those heads.
    """
    check_quantization(quantization)
    m = checkpoint.config
    if not 0 <= tp_rank < tp_size:
        raise ConfigError(f"a rank below {tp_size} expected, got {tp_rank}", field="tensor_parallel")
    if tp_size > m.heads:
        raise _too_many(tp_size, f"{m.heads} attention heads")
    group = _down_group(checkpoint, quantization)
    if tp_size > -(-m.intermediate // group):
        group = min(group, SMALL_GROUP)  # groups can be cut in halves exactly
    if tp_size > -(-m.intermediate // group):
        raise _too_many(tp_size, f"an MLP of {m.intermediate} in groups of {group}")
    if tp_size > m.vocab:
        raise _too_many(tp_size, f"a vocabulary of {m.vocab}")
    spec = ShardSpec(m, tp_size, tp_rank, group)
    if group > 1:
        _check_heads(spec)
    return spec


def _too_many(tp_size: int, what: str) -> ConfigError:
    return ConfigError(f"{tp_size} ranks are too many for {what}", field="tensor_parallel")


def _wanted_format(name: str, stored: str, quantization: str) -> str:
    wanted = target_format(stored, quantization)
    vocabulary = name in (EMBEDDING, LM_HEAD)
    return "int8" if wanted == "int4" and vocabulary and quantization == "int4" else wanted


def _down_group(checkpoint: Checkpoint, quantization: str) -> int:
    """A multiple of every layer's group along the inputs of its down projection; 1 for float weights."""
    groups = []
    for layer in range(checkpoint.config.layers):
        name = layer_prefix(layer) + "mlp.down_proj.weight"
        stored = checkpoint.storage(name)
        wanted = _wanted_format(name, stored.format, quantization)
        groups.append(max(stored.group, 1))
        if wanted != stored.format and wanted in ("int4", "int8"):
            groups.append(_group_for(checkpoint.config.head_dim))
    return lcm(*groups)


def _group_for(head_dim: int) -> int:
    """The group of weights quantised here: one that heads can be cut by, for the same codes on any number of ranks."""
    return DEFAULT_GROUP if head_dim % DEFAULT_GROUP == 0 else SMALL_GROUP


def _on_border(cols: Span, group: int, width: int) -> bool:
    return cols.start % group == 0 and (cols.stop % group == 0 or cols.stop == width)


def _check_heads(spec: ShardSpec) -> None:
    width = spec.model.heads * spec.model.head_dim
    for rank in range(spec.tp_size):
        if not _on_border(spec.for_rank(rank).q_rows, SMALL_GROUP, width):
            raise ConfigError(
                f"quantised weights cannot be cut between heads of {spec.model.head_dim}, which is no multiple of "
                f"{SMALL_GROUP}; use tensor_parallel: 1",
                field="tensor_parallel",
            )
