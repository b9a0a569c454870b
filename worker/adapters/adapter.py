"""LoRA adapters (arXiv:2106.09685) in PEFT's layout: the factors of each matrix of a model, under canonical names.

Shape legend: N rows (outputs), K columns (inputs), R rank.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flm.kernels.quant import QuantizedMatrix
from flm.worker.adapters.config import AdapterConfig, read_adapter_config
from flm.worker.adapters.file import CUT_INPUTS, Module, factors_of, modules_of, open_factors
from flm.worker.canonical import decoder_tensors
from flm.worker.checkpoints.checkpoint import Checkpoint
from flm.worker.config import ModelConfig, ShardSpec, Span
from flm.worker.errors import CheckpointError
from flm.worker.tensors.recipe import Recipe
from flm.worker.tensors.tensor_source import SafetensorsSource

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterSource:
    """An adapter as cluster.yaml names it. max_rank: refuse one of a larger rank; 0: no bound."""

    name: str
    path: str
    max_rank: int = 0


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: everything in it belongs to the model, in the right shape. Nothing is in memory but its header.

    modules: canonical name of a matrix (with .weight) → the module of the base model that holds it, for those it changes.
    """

    name: str
    settings: AdapterConfig
    modules: dict[str, str]
    downs: Checkpoint  # lora_A under the matrices' names
    ups: Checkpoint  # lora_B

    def rank(self, matrix: str) -> int:
        return self.settings.rank_of(self.modules[matrix])

    def scale(self, matrix: str) -> float:
        """What up @ down is multiplied by before it is added to the weight."""
        return self.settings.scale_of(self.modules[matrix])

    def down(self, matrix: str, cols: Span | None = None) -> QuantizedMatrix:
        """[R, K], or some of its columns."""
        return self.downs.matrix(matrix, None, cols)

    def up(self, matrix: str, rows: Span | None = None) -> QuantizedMatrix:
        """[N, R], or some of its rows, in the order of the canonical matrix."""
        return self.ups.matrix(matrix, rows)

    @property
    def largest_rank(self) -> int:
        return max(map(self.rank, self.modules))

    def nbytes(self, shard: ShardSpec) -> int:
        """Bytes of the factors on one rank; CPUs round the rank of `down` up to 16."""
        specs, total = decoder_tensors(shard.model), 0.0
        shared: set[str] = set()  # a fused module's down serves all of its matrices
        for matrix, module in self.modules.items():
            share = shard.share(specs[matrix].split)
            down, up = self.downs.storage(matrix).nbytes, self.ups.storage(matrix).nbytes
            down = 0 if module in shared else down * (-(-self.rank(matrix) // 16) * 16) // self.rank(matrix)
            total += down * share + up if cuts_inputs(matrix) else down + up * share
            shared.add(module)
        return int(total)


def cuts_inputs(matrix: str) -> bool:
    """Whether ranks have some columns each of this matrix, rather than some rows."""
    return matrix.split(".")[-2] in CUT_INPUTS


def open_adapters(sources: Sequence[AdapterSource], model: Path, config: ModelConfig) -> tuple[Adapter, ...]:
    """Adapters of the checkpoint at `model`. Raises CheckpointError for one that is not of that model or cannot be served.
    A base model of another name is only warned about: directories get renamed."""
    if not sources:
        return ()
    modules = modules_of(model, config)
    return tuple(_open(source, model, config, modules) for source in sources)


def _open(source: AdapterSource, model: Path, config: ModelConfig, modules: dict[str, Module]) -> Adapter:
    directory = Path(source.path).expanduser()
    settings, file = read_adapter_config(directory), open_factors(directory)
    factors = factors_of(file, modules, config, settings)
    tensors = SafetensorsSource(directory, dict.fromkeys(file.tensors, file))
    downs: dict[str, tuple[Recipe, tuple[int, ...]]] = {}
    ups: dict[str, tuple[Recipe, tuple[int, ...]]] = {}
    held: dict[str, str] = {}
    specs = decoder_tensors(config)
    for name, (down, up) in factors.items():
        rank = settings.rank_of(name)
        for matrix, recipe in modules[name].rows.items():
            held[matrix] = name
            downs[matrix] = Recipe(down), (rank, specs[matrix].shape[1])
            ups[matrix] = replace(recipe, tensor=up), (specs[matrix].shape[0], rank)
    sides = (
        Checkpoint(
            directory,
            config,
            "",
            0,
            tensors,
            {name: recipe for name, (recipe, _) in side.items()},
            {name: shape for name, (_, shape) in side.items()},
        )
        for side in (downs, ups)
    )
    adapter = Adapter(source.name, settings, held, *sides)
    for matrix in held:
        adapter.downs.storage(matrix), adapter.ups.storage(matrix)  # raises where it cannot be read
    if 0 < source.max_rank < adapter.largest_rank:
        raise CheckpointError(
            str(directory), f"max_rank allows {source.max_rank}, found a rank of {adapter.largest_rank}"
        )
    _warn_of_another_base(adapter, model)
    return adapter


def _warn_of_another_base(adapter: Adapter, model: Path) -> None:
    said, found = (
        path.rstrip("/").rpartition("/")[2].lower() for path in (adapter.settings.base, str(model))
    )
    if said not in found and found not in said:
        log.warning(
            "adapter %s was trained on %s; it is served with %s, whose shapes it fits",
            adapter.name,
            adapter.settings.base,
            model,
        )
