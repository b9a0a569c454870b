"""A checkpoint: the config of its decoder, and slices of its tensors under canonical names.

Shape legend: N rows (outputs), K columns (inputs).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flm.kernels.quant import QuantizedMatrix
from flm.worker.canonical import LM_HEAD, decoder_tensors
from flm.worker.checkpoints.cut_source import SHARDS_NAME, Cut, CutSource
from flm.worker.config import ModelConfig, Span
from flm.worker.errors import CheckpointError
from flm.worker.families import registry
from flm.worker.families.family import Family, same_names
from flm.worker.files.gguf_file import GGUFFile
from flm.worker.files.json_fields import read_json
from flm.worker.files.pickle_file import open_pickle_files
from flm.worker.files.safetensors_file import TensorFile, open_safetensors
from flm.worker.packing.config import read_packing
from flm.worker.packing.source import PackedSource
from flm.worker.tensors.precision import fuse
from flm.worker.tensors.recipe import Recipe, unit_rows
from flm.worker.tensors.tensor_source import GGUFSource, SafetensorsSource, Storage


class TensorSource(Protocol):
    """Tensors of one file format under the checkpoint's own names. Spans lie within the shape."""

    def names(self) -> Iterable[str]: ...
    def has(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def storage(self, name: str) -> Storage: ...
    def matrix(self, name: str, rows: Span, cols: Span) -> QuantizedMatrix: ...
    def vector(self, name: str, span: Span) -> NDArray[np.float32]: ...
    def will_read(self, name: str, rows: Span, cols: Span) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every tensor that `config` needs is there, in the right shape. Nothing is in memory
    but its header; only what is asked for is read. Names are canonical ones."""

    path: Path
    config: ModelConfig
    quantization: str  # the storage of most of its weights, e.g. "Q4_1" or "float32"
    total_bytes: int  # of the tensors that the decoder needs
    source: TensorSource
    recipes: dict[str, Recipe]
    shapes: dict[str, tuple[int, ...]]
    cut: Cut | None = None  # where it was converted for a number of ranks

    def has(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def storage(self, name: str) -> Storage:
        """How the tensor is stored; nbytes counts its own part of a fused one."""
        stored = self.source.storage(self.recipes[name].tensor)
        shape = self.source.shape(self.recipes[name].tensor)
        whole = shape[-1] if len(self.shapes[name]) == 1 else shape[0]
        return replace(stored, nbytes=stored.nbytes * self.shapes[name][0] // whole)

    def matrix(self, name: str, rows: Span | None = None, cols: Span | None = None) -> QuantizedMatrix:
        """Rows and columns of a matrix [N, K] in the checkpoint's own precision, exactly. `cols` must not cut a
        quantisation group (kernels' ShapeError)."""
        recipe, (n, k) = self.recipes[name], self.shapes[name]
        rows, cols = rows or Span(0, n), cols or Span(0, k)
        wide = recipe.whole_heads(rows)
        parts = [self.source.matrix(recipe.tensor, run, cols) for run in recipe.runs(wide)]
        matrix = parts[0] if len(parts) == 1 else fuse(parts)
        order = recipe.reorder(wide.size)
        if order is not None:
            matrix = matrix.permute_rows(order[rows.start - wide.start : rows.stop - wide.start])
        return unit_rows(matrix) if recipe.unit_rows else matrix

    def vector(self, name: str, span: Span | None = None) -> NDArray[np.float32]:
        """Entries of a vector as float32, a copy."""
        recipe, span = self.recipes[name], span or Span(0, self.shapes[name][0])
        wide = recipe.whole_heads(span)
        values = np.concatenate([self.source.vector(recipe.tensor, run) for run in recipe.runs(wide)])
        order = recipe.reorder(wide.size)
        values = values if order is None else values[order]
        return values[span.start - wide.start : span.stop - wide.start]

    def will_read(self, name: str, rows: Span, cols: Span) -> None:
        """Begin to read a piece of a matrix from the disk, on another thread."""
        recipe = self.recipes[name]
        for run in recipe.runs(recipe.whole_heads(rows)):
            self.source.will_read(recipe.tensor, run, cols)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face directory or a .gguf file. Raises CheckpointError with file, expected and found."""
    if path.is_dir():
        if (path / SHARDS_NAME).is_file():
            return _open_cut(path)
        return _open_directory(path, open_safetensors(path))
    file = GGUFFile(path)
    config, family = registry.read_gguf(file)
    return _checked(path, config, family, GGUFSource(file))


def open_pickles(path: Path) -> Checkpoint:
    """Open a directory of PyTorch's .bin files, which only a conversion does. Raises as open_checkpoint."""
    return _open_directory(path, open_pickle_files(path))


def _open_directory(path: Path, tensors: Mapping[str, TensorFile]) -> Checkpoint:
    config, family = registry.read_config(path)
    packing = read_packing(read_json(path / "config.json"))
    source = SafetensorsSource(path, tensors) if packing is None else PackedSource(path, tensors, packing)
    return _checked(path, config, family, source)


def _open_cut(path: Path) -> Checkpoint:
    (config, family), source = registry.read_config(path), CutSource(path)
    canonical = replace(family, recipes=same_names, optional_prefix="")
    return replace(_checked(path, config, canonical, source), cut=source.cut)


def _checked(path: Path, config: ModelConfig, family: Family, source: TensorSource) -> Checkpoint:
    config, recipes = _with_own_head(config, family, source)
    specs = decoder_tensors(config)
    shapes = {name: spec.shape for name, spec in specs.items()}
    _check_tensors(path, source, recipes, shapes)
    ignored = lambda name: family.is_ignored(name, config.layers)
    _check_extras(path, source, {recipe.tensor for recipe in recipes.values()}, ignored)
    checkpoint = Checkpoint(path, config, "", 0, source, recipes, shapes)
    total, labels = 0, Counter[str]()
    for name, shape in shapes.items():
        storage = checkpoint.storage(name)
        total += storage.nbytes
        labels[storage.label] += storage.nbytes if len(shape) == 2 and "layers" in name else 0
    return replace(checkpoint, quantization=labels.most_common(1)[0][0], total_bytes=total)


def _with_own_head(
    config: ModelConfig, family: Family, source: TensorSource
) -> tuple[ModelConfig, dict[str, Recipe]]:
    """A checkpoint that says its head is the embedding, and holds a head nonetheless, means the head."""
    if config.tie_embeddings:
        untied = replace(config, tie_embeddings=False)
        recipes = family.locate(untied, source.names())
        if source.has(recipes[LM_HEAD].tensor):
            return untied, recipes
    return config, family.locate(config, source.names())


def _check_tensors(
    path: Path, source: TensorSource, recipes: dict[str, Recipe], shapes: dict[str, tuple[int, ...]]
) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        recipe = recipes[name]
        rows = recipe.last_row(shape[0]) + 1
        rows = max(rows, wanted.get(recipe.tensor, (0,))[0])
        wanted[recipe.tensor] = (rows, *shape[1:])
    missing = [
        f"{tensor!r} {list(expected)}" for tensor, expected in wanted.items() if not source.has(tensor)
    ]
    if missing:
        others = f", as are {_named(missing[1:])}" if missing[1:] else ""
        raise CheckpointError(str(path), f"tensor {missing[0]} is missing{others}")
    for tensor, expected in wanted.items():
        found = source.shape(tensor)
        if len(expected) == 1:  # RWKV keeps vectors as [1, 1, n]
            found = found[next((i for i, n in enumerate(found[:-1]) if n != 1), len(found) - 1) :]
        if found != expected:
            raise CheckpointError(
                str(path), f"tensor {tensor!r}: shape {list(expected)} expected, found {list(found)}"
            )
        source.storage(tensor)  # raises where it cannot be read


def _check_extras(path: Path, source: TensorSource, used: set[str], ignored: Callable[[str], bool]) -> None:
    extra = sorted(name for name in source.names() if name not in used and not ignored(name))
    if extra:
        raise CheckpointError(
            str(path),
            f"tensors that the model does not have: {_named([repr(name) for name in extra])}; "
            "config.json and weights do not belong together",
        )


def _named(tensors: list[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(tensors[:3]) + (f" and {len(tensors) - 3} more" if len(tensors) > 3 else "")
