"""A checkpoint: the config of its decoder, and slices of its tensors under canonical names.

Shape legend: N rows (outputs), K columns (inputs).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flm.kernels.quant import QuantizedMatrix
from flm.worker.config import ModelConfig, Span
from flm.worker.errors import CheckpointError
from flm.worker.families import llama, llama_gguf
from flm.worker.gguf_file import GGUFFile
from flm.worker.safetensors_file import open_safetensors
from flm.worker.tensor_source import GGUFSource, SafetensorsSource, Storage


class TensorSource(Protocol):
    """Tensors of one file format under canonical names. Spans lie within the shape."""

    def has(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def storage(self, name: str) -> Storage: ...
    def matrix(self, name: str, rows: Span, cols: Span) -> QuantizedMatrix: ...
    def vector(self, name: str, span: Span) -> NDArray[np.float32]: ...
    def drop_pages(self) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every tensor that `config` needs is there, in the right shape. Nothing is in memory
    but its header; reads touch only the pages of what they return."""

    path: Path
    config: ModelConfig
    quantization: str  # the storage of most of its weights, e.g. "Q4_1" or "float32"
    total_bytes: int  # of the tensors that the decoder needs
    source: TensorSource

    def has(self, name: str) -> bool:
        return self.source.has(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def storage(self, name: str) -> Storage:
        """How the tensor is stored."""
        return self.source.storage(name)

    def matrix(self, name: str, rows: Span | None = None, cols: Span | None = None) -> QuantizedMatrix:
        """Rows and columns of a matrix [N, K] in the checkpoint's own precision, exactly. `cols` must not cut a
        quantisation group (kernels' ShapeError). Float matrices may be views of the file: copy what shall stay."""
        n, k = self.source.shape(name)
        return self.source.matrix(name, rows or Span(0, n), cols or Span(0, k))

    def vector(self, name: str, span: Span | None = None) -> NDArray[np.float32]:
        """Entries of a vector as float32, a copy."""
        return self.source.vector(name, span or Span(0, self.source.shape(name)[0]))

    def drop_pages(self) -> None:
        """Take what was read so far out of the process' resident set."""
        self.source.drop_pages()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face directory or a .gguf file. Raises CheckpointError with file, expected and found."""
    if path.is_dir():
        config = llama.read_config(path)
        return _checked(path, config, SafetensorsSource(path, open_safetensors(path)))
    file = GGUFFile(path)
    config = llama_gguf.read_config(file)
    return _checked(path, config, GGUFSource(file, config.head_dim))


def _checked(path: Path, config: ModelConfig, source: TensorSource) -> Checkpoint:
    total, labels = 0, Counter[str]()
    for name, expected in llama.expected_shapes(config).items():
        if not source.has(name):
            raise CheckpointError(str(path), f"tensor {name!r} {list(expected)} is missing")
        found = source.shape(name)
        if found != expected:
            raise CheckpointError(
                str(path), f"tensor {name!r}: shape {list(expected)} expected, found {list(found)}"
            )
        storage = source.storage(name)
        total += storage.nbytes
        labels[storage.label] += storage.nbytes if len(expected) == 2 and "layers" in name else 0
    return Checkpoint(path, config, labels.most_common(1)[0][0], total, source)
