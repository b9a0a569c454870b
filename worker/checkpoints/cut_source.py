"""Reading a checkpoint that was cut for a number of ranks.

rank-RRRRR-of-NNNNN.safetensors holds what rank R of N reads, under canonical names and in the precision it runs in;
shards.json says which rows and columns of each tensor these are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.quant import QuantizedMatrix
from flm.worker.config import Span
from flm.worker.errors import CheckpointError
from flm.worker.files.safetensors_file import SafetensorsFile
from flm.worker.packing.prepared import Prepared
from flm.worker.packing.source import PackedSource
from flm.worker.tensors.tensor_source import Storage

SHARDS_NAME = "shards.json"
Box = tuple[int, ...]  # first and last + 1 of each axis


@dataclass(frozen=True)
class Cut:
    """For how many ranks a checkpoint was cut, the group on whose borders its feed-forward widths were, and whether each
    rank holds some experts whole."""

    ranks: int
    group: int
    expert_parallel: bool = False

    def __str__(self) -> str:
        return f"tensor_parallel: {self.ranks}" + (", expert_parallel: true" if self.expert_parallel else "")


def rank_file(rank: int, ranks: int) -> str:
    return f"rank-{rank:05d}-of-{ranks:05d}.safetensors"


def box_of(*spans: Span) -> Box:
    return tuple(bound for span in spans for bound in (span.start, span.stop))


def _boxes(raw: Any, ranks: int) -> list[Box | None]:
    """Each rank's piece of one tensor. ValueError or TypeError for anything else."""
    boxes = [None if box is None else tuple(box) for box in raw]
    found = [box for box in boxes if box is not None]
    whole = all(type(bound) is int and bound >= 0 for box in found for bound in box)
    if len(boxes) != ranks or not found or not whole or {len(box) for box in found} not in ({2}, {4}):
        raise ValueError(f"a piece of each of {ranks} ranks expected, found {raw!r:.80}")
    return boxes


class CutSource:
    """Tensors under canonical names; only the pieces that were written can be read."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / SHARDS_NAME
        try:
            raw = json.loads(self._path.read_text(encoding="utf-8"))
            self.cut = Cut(int(raw["ranks"]), int(raw["group"]), bool(raw.get("expert_parallel")))
            pieces = {str(name): _boxes(boxes, self.cut.ranks) for name, boxes in raw["pieces"].items()}
            columns = [{str(n): int(k) for n, k in of_rank.items()} for of_rank in raw["columns"]]
            if self.cut.ranks < 1 or self.cut.group < 1 or len(columns) != self.cut.ranks:
                raise ValueError(f"{self.cut}, group {self.cut.group}, columns of {len(columns)} ranks")
        except OSError as error:
            raise CheckpointError(str(self._path), f"cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(
                str(self._path), f"expected ranks, group, pieces and columns: {error!r}"
            ) from error
        self._pieces: dict[str, list[Box | None]] = pieces
        files = [
            SafetensorsFile(directory / rank_file(rank, self.cut.ranks)) for rank in range(self.cut.ranks)
        ]
        self._ranks = [
            PackedSource(directory, dict.fromkeys(file.tensors, file), Prepared(of_rank))
            for file, of_rank in zip(files, columns, strict=True)
        ]
        self._check()

    def _check(self) -> None:
        for name, boxes in self._pieces.items():
            for rank, box in enumerate(boxes):
                if box is None:
                    continue
                shape = tuple(b - a for a, b in zip(box[::2], box[1::2], strict=True))
                file = str(self._path.parent / rank_file(rank, self.cut.ranks))
                if not self._ranks[rank].has(name):
                    raise CheckpointError(file, f"tensor {name!r} {list(shape)} is missing")
                if self._ranks[rank].shape(name) != shape:
                    found = list(self._ranks[rank].shape(name))
                    raise CheckpointError(
                        file, f"tensor {name!r}: shape {list(shape)} expected, found {found}"
                    )

    def names(self) -> Iterable[str]:
        return self._pieces

    def has(self, name: str) -> bool:
        return name in self._pieces

    def shape(self, name: str) -> tuple[int, ...]:
        boxes = [box for box in self._pieces[name] if box is not None]
        return tuple(max(stops) for stops in zip(*(box[1::2] for box in boxes), strict=True))

    def storage(self, name: str) -> Storage:
        """Of all pieces together; the group is the smallest one's."""
        held = [
            r.storage(name) for r, box in zip(self._ranks, self._pieces[name], strict=True) if box is not None
        ]
        smallest = min(held, key=lambda storage: storage.group)
        return replace(smallest, nbytes=sum(storage.nbytes for storage in held))

    def matrix(self, name: str, rows: Span, cols: Span) -> QuantizedMatrix:
        source, (rows, cols) = self._holder(name, rows, cols)
        return source.matrix(name, rows, cols)

    def vector(self, name: str, span: Span) -> NDArray[np.float32]:
        source, (span,) = self._holder(name, span)
        return source.vector(name, span)

    def will_read(self, name: str, rows: Span, cols: Span) -> None:
        if self._rank_of(name, rows, cols) is not None:
            source, (rows, cols) = self._holder(name, rows, cols)
            source.will_read(name, rows, cols)

    def _rank_of(self, name: str, *spans: Span) -> int | None:
        """A rank whose piece holds those rows, and exactly those columns: rows of a piece may be read a few at a time."""
        first, *others = spans
        for rank, box in enumerate(self._pieces[name]):
            if box is None or box[2:] != box_of(*others):
                continue
            if box[0] <= first.start <= first.stop <= box[1]:
                return rank
        return None

    def _holder(self, name: str, *spans: Span) -> tuple[PackedSource, list[Span]]:
        """A rank's file, and where the spans are in its piece."""
        rank = self._rank_of(name, *spans)
        if rank is None:
            raise CheckpointError(
                str(self._path),
                f"was cut for {self.cut.ranks} ranks, none of which reads {list(box_of(*spans))} of {name!r}",
            )
        box = self._pieces[name][rank]
        assert box is not None
        return self._ranks[rank], [
            Span(span.start - start, span.stop - start) for span, start in zip(spans, box[::2], strict=True)
        ]
