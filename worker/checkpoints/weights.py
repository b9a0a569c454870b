"""The weights of one rank: its slices of every matrix, fused and in the wanted precision.

Shape legend: N rows (outputs), K columns (inputs).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from math import gcd, lcm, prod
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from flm.kernels.quant import QuantizedMatrix
from flm.kernels.stored import StoredMatrix
from flm.worker.canonical import EMBEDDING, LM_HEAD, decoder_tensors
from flm.worker.checkpoints.checkpoint import Checkpoint
from flm.worker.config import ModelConfig, ShardSpec, Span
from flm.worker.errors import ConfigError
from flm.worker.tensors.precision import (
    SMALL_GROUP,
    Precision,
    convert,
    fuse,
    parse_quantization,
    regroup,
    row_pieces,
    stored_below,
)
from flm.worker.tensors.tensor_source import stack_rows

Vector = NDArray[np.float32]
LAYER = re.compile(r"layers\.(\d+)\.")


class ModelWeights:
    """One rank's weights by canonical names, read when asked for, so that a caller who packs each one at once never holds
    a second copy of the shard. Every access reads anew. on_progress gets the fraction of weights read so far, 0 to 1."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        shard: ShardSpec,
        precision: Precision,
        on_progress: Callable[[float], None],
    ) -> None:
        self.shard = shard
        self._checkpoint, self._precision = checkpoint, precision
        self._on_progress, self._read, self._lock = on_progress, 0, Lock()
        self._told: set[tuple[str, Span, Span]] = set()

    @property
    def embedding(self) -> StoredMatrix:
        """This rank's rows of the vocabulary."""
        return self.stored(EMBEDDING, self.shard.vocab)

    @property
    def lm_head(self) -> StoredMatrix | None:
        """This rank's rows of the vocabulary; None where the embedding serves as the head."""
        return None if self.shard.model.tie_embeddings else self.stored(LM_HEAD, self.shard.vocab)

    @property
    def lm_head_bias(self) -> Vector | None:
        return self.vector_or_none("lm_head.bias", self.shard.vocab)

    def fused(self, prefix: str, parts: Sequence[tuple[str, Span]]) -> QuantizedMatrix:
        """Rows of several matrices over the same inputs, one below the other: [(name without .weight, rows)]."""
        return fuse([self.matrix(f"{prefix}{name}.weight", rows) for name, rows in parts])

    def fused_bias(self, prefix: str, parts: Sequence[tuple[str, Span]]) -> Vector | None:
        """The biases of those rows; None where the model has none."""
        if not self._checkpoint.has(f"{prefix}{parts[0][0]}.bias"):
            return None
        return np.concatenate([self.vector(f"{prefix}{name}.bias", span) for name, span in parts])

    def bias_once(self, name: str) -> Vector | None:
        """The bias of a row-parallel matrix, on rank 0 alone, since the sum over ranks must hold it once."""
        return self.vector_or_none(name) if self.shard.tp_rank == 0 else None

    def vector(self, name: str, span: Span | None = None) -> Vector:
        return self._checkpoint.vector(name, span)

    def vector_or_none(self, name: str, span: Span | None = None) -> Vector | None:
        return self.vector(name, span) if self._checkpoint.has(name) else None

    def stored(self, name: str, rows: Span | None = None, cols: Span | None = None) -> StoredMatrix:
        """As matrix, to be read by whoever packs it."""
        whole_rows, whole_cols = self._announced(name, rows, cols)
        if not self._checkpoint.storage(name).by_rows:
            return self._read_at_once(name, whole_rows, whole_cols)

        def read(start: int, stop: int) -> QuantizedMatrix:
            span = Span(whole_rows.start + start, whole_rows.start + stop)
            return self._counted(self._piece(name, span, whole_cols))

        return StoredMatrix((whole_rows.size, whole_cols.size), read)

    def _read_at_once(self, name: str, rows: Span, cols: Span) -> StoredMatrix:
        """Of a file whose rows are inputs: a few outputs are some bytes of every one of them. Kept packed until it is not
        needed any more."""
        lock, held = Lock(), list[QuantizedMatrix]()

        def read(start: int, stop: int) -> QuantizedMatrix:
            with lock:
                if not held:
                    held.append(self._counted(self._piece(name, rows, cols)))
            return held[0].slice_rows(start, stop)

        return StoredMatrix((rows.size, cols.size), read)

    def stored_below(self, prefix: str, parts: Sequence[tuple[str, Span]]) -> StoredMatrix:
        """As fused, to be read by whoever packs it."""
        names = [f"{prefix}{name}.weight" for name, _ in parts]
        stored = [self.stored(name, rows) for name, (_, rows) in zip(names, parts, strict=True)]
        if len(stored) == 1:
            return stored[0]
        return stored_below(stored, [part.read(0, min(1, part.shape[0])) for part in stored])

    def matrix(self, name: str, rows: Span | None = None, cols: Span | None = None) -> QuantizedMatrix:
        """Rows and columns of a matrix in the wanted precision."""
        return self._counted(self._piece(name, *self._announced(name, rows, cols)))

    def _announced(self, name: str, rows: Span | None, cols: Span | None) -> tuple[Span, Span]:
        """What is read of the matrix. The disk begins with it, and with the same piece of the next layer's: what ranks read of
        their layers is alike."""
        n, k = self._checkpoint.shape(name)
        rows, cols = rows or Span(0, n), cols or Span(0, k)
        following = LAYER.sub(lambda found: f"layers.{int(found[1]) + 1}.", name, count=1)
        for each in dict.fromkeys((name, following)):
            if (each, rows, cols) not in self._told and self._checkpoint.has(each):
                self._told.add((each, rows, cols))
                if self._checkpoint.shape(each) == (n, k):
                    self._checkpoint.will_read(each, rows, cols)
        return rows, cols

    def _piece(self, name: str, rows: Span, cols: Span) -> QuantizedMatrix:
        """As matrix; several threads may ask at once."""
        k = self._checkpoint.shape(name)[1]
        stored = self._checkpoint.storage(name)
        wanted = self._precision.wanted(name, stored.format)
        rounded = wanted in ("int4", "int8") and wanted != stored.format
        group = self._precision.group_for(k) if rounded else stored.group
        # whole groups are rounded and then cut, so that no weight depends on the number of ranks
        outer = _around(cols, lcm(max(group, 1), max(stored.group, 1)), k)
        matrix = self._converted(name, rows, outer, wanted, group)
        if outer != cols:
            matrix = regroup(matrix, gcd(matrix.group, cols.start, 0 if cols.stop == k else cols.stop))
            matrix = matrix.slice_cols(cols.start - outer.start, cols.stop - outer.start)
        return matrix

    def _counted(self, matrix: QuantizedMatrix) -> QuantizedMatrix:
        with self._lock:
            self._read += prod(matrix.shape)
            self._on_progress(min(self._read / self._total, 1.0))
        return matrix

    def _converted(self, name: str, rows: Span, cols: Span, wanted: str, group: int) -> QuantizedMatrix:
        if wanted == self._checkpoint.storage(name).format:
            return self._checkpoint.matrix(name, rows, cols)
        read: Callable[[int, int], QuantizedMatrix]
        if self._checkpoint.storage(name).by_rows:
            read = lambda a, b: self._checkpoint.matrix(name, Span(rows.start + a, rows.start + b), cols)
        else:
            read = self._checkpoint.matrix(name, rows, cols).slice_rows
        pieces = (convert(read(a, b), wanted, group) for a, b in row_pieces(rows.size, cols.size))
        return stack_rows(pieces, rows.size)

    @cached_property
    def _total(self) -> float:
        """Weights of this shard."""
        specs = decoder_tensors(self.shard.model).values()
        return sum(prod(spec.shape) * self.shard.share(spec.split) for spec in specs if len(spec.shape) == 2)


def load_weights(
    checkpoint: Checkpoint, shard: ShardSpec, quantization: str, on_progress: Callable[[float], None]
) -> ModelWeights:
    """This rank's weights, read lazily. quantization "auto" keeps the checkpoint's precision; "int8", "int4", "bf16",
    "fp16" and "fp32" convert, the first two also with a group, as "int4:group=64". Weights that are integers of that
    width already stay as they are. Raises ConfigError for another name."""
    return ModelWeights(checkpoint, shard, parse_quantization(quantization), on_progress)


def shard_spec(
    checkpoint: Checkpoint, tp_size: int, tp_rank: int, quantization: str, expert_parallel: bool = False
) -> ShardSpec:
    """The shard of one rank, with its splits on the borders of the groups that the weights will have.

    Raises ConfigError where some rank would have no heads, no part of the MLP, no experts or no vocabulary, or where
    quantised weights cannot be cut between those heads.
    """
    precision, cut = parse_quantization(quantization), checkpoint.cut
    m = checkpoint.config
    if cut is not None and (tp_size, expert_parallel) != (cut.ranks, cut.expert_parallel):
        field = "tensor_parallel" if tp_size != cut.ranks else "expert_parallel"
        raise ConfigError(f"{checkpoint.path} was converted for {cut}", field=field)
    if cut is not None and precision.format:
        raise ConfigError(f"{checkpoint.path} is converted already; auto expected", field="quantization")
    if not 0 <= tp_rank < tp_size:
        raise ConfigError(f"a rank below {tp_size} expected, got {tp_rank}", field="tensor_parallel")
    if tp_size > m.attention.heads:
        raise _too_many(tp_size, f"{m.attention.heads} attention heads")
    if expert_parallel:
        _check_experts(m, tp_size)
    widths = _cut_widths(m, expert_parallel)
    group = cut.group if cut else _down_group(checkpoint, precision)
    if any(tp_size > -(-width // group) for width in widths.values()):
        group = min(group, SMALL_GROUP)  # groups can be cut in halves exactly
    for what, width in widths.items():
        if tp_size > -(-width // group):
            raise _too_many(tp_size, f"{what} of {width} in groups of {group}")
    if tp_size > m.vocab:
        raise _too_many(tp_size, f"a vocabulary of {m.vocab}")
    spec = ShardSpec(m, tp_size, tp_rank, group, expert_parallel)
    if group > 1:
        _check_heads(spec)
    return spec


def _cut_widths(m: ModelConfig, expert_parallel: bool) -> dict[str, int]:
    """The feed-forward widths that ranks share by columns."""
    widths = {}
    if not all(m.is_sparse(layer) for layer in range(m.layers)):
        widths["an MLP"] = m.feed_forward.intermediate
    if m.experts is not None and not expert_parallel:
        widths["an expert"] = m.experts.width
    if m.experts is not None and m.experts.shared:
        widths["a shared expert"] = m.experts.shared
    return widths


def _check_experts(m: ModelConfig, tp_size: int) -> None:
    if m.experts is None:
        raise ConfigError("a model with experts expected; this one has none", field="expert_parallel")
    if tp_size > m.experts.count:
        raise _too_many(tp_size, f"{m.experts.count} experts")


def _too_many(tp_size: int, what: str) -> ConfigError:
    return ConfigError(f"{tp_size} ranks are too many for {what}", field="tensor_parallel")


def _down_group(checkpoint: Checkpoint, precision: Precision) -> int:
    """A multiple of every layer's group along the inputs of its down projection; 1 for float weights."""
    groups = [1]
    for name in (n for n in checkpoint.shapes if n.endswith(".down_proj.weight")):
        stored = checkpoint.storage(name)
        wanted = precision.wanted(name, stored.format)
        groups.append(max(stored.group, 1))
        if wanted != stored.format and wanted in ("int4", "int8"):
            groups.append(precision.group_for(checkpoint.shape(name)[1]))
    return lcm(*groups)


def _around(cols: Span, group: int, width: int) -> Span:
    """`cols` widened to whole groups."""
    return Span(cols.start // group * group, min(-(-cols.stop // group) * group, width))


def _on_border(cols: Span, group: int, width: int) -> bool:
    return cols.start % group == 0 and (cols.stop % group == 0 or cols.stop == width)


def _check_heads(spec: ShardSpec) -> None:
    a = spec.model.attention
    width = a.heads * a.value_dim
    for rank in range(spec.tp_size):
        if not _on_border(spec.for_rank(rank).value_cols, SMALL_GROUP, width):
            raise ConfigError(
                f"quantised weights cannot be cut between heads of {a.value_dim}, which is no multiple of "
                f"{SMALL_GROUP}; use tensor_parallel: 1",
                field="tensor_parallel",
            )
