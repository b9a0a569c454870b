"""The weights of a model by shape, from a checkpoint's header or from a config.json alone: what a plan counts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flm.worker.adapters.adapter import Adapter, AdapterSource, open_adapters
from flm.worker.canonical import EMBEDDING, ROUTERS, VOCABULARY, decoder_tensors
from flm.worker.checkpoints.checkpoint import Checkpoint, open_checkpoint
from flm.worker.checkpoints.weights import shard_spec
from flm.worker.config import ModelConfig, ShardSpec
from flm.worker.families import registry
from flm.worker.files.json_fields import read_json
from flm.worker.files.paths import resolve_model_path
from flm.worker.files.safetensors_file import why_pickles
from flm.worker.packing.config import read_packing, said_storage
from flm.worker.packing.module import Packing
from flm.worker.tensors.precision import parse_quantization
from flm.worker.tensors.tensor_source import Storage

FLOAT_BITS = {"float32": 32.0, "float16": 16.0, "bfloat16": 16.0}


@dataclass(frozen=True)
class Weight:
    """`count` tensors alike of rows x cols weights. `split` names the axis that ranks share it by: heads, kv, ffn,
    vocab, experts, shared, or whole (every rank holds all of it). `read` is the part that one token's decode reads."""

    name: str
    rows: int
    cols: int
    split: str
    storage: Storage
    count: int = 1
    read: float = 1.0

    @property
    def elements(self) -> int:
        return self.rows * self.cols * self.count

    def bits(self, quantization: str) -> float:
        """Bits per weight in memory, scales and offsets included, under the config's `quantization`."""
        if self.cols == 1:
            return 32.0  # vectors are kept in float32
        precision = parse_quantization(quantization)
        wanted = precision.wanted(self.name, self.storage.format)
        if wanted == self.storage.format:
            return self.storage.bits
        if wanted in FLOAT_BITS:
            return FLOAT_BITS[wanted]
        if self.storage.format == "int4":
            return self.storage.bits + 4  # the same codes in eight bits
        return (4 + 32 / precision.group) if wanted == "int4" else 8 + 16 / precision.group


@dataclass(frozen=True)
class Shapes:
    """A model by its shapes. `unservable` says why `up` could not serve it, empty where it can."""

    config: ModelConfig
    weights: tuple[Weight, ...]
    precision: str
    unservable: str = ""
    checkpoint: Checkpoint | None = None  # where there are weights
    place: Path | None = None

    def shard(
        self, tensor_parallel: int, rank: int, quantization: str, expert_parallel: bool = False
    ) -> ShardSpec:
        """A rank's part, cut where the engine cuts. ConfigError where it cannot be cut so."""
        if self.checkpoint is not None:
            return shard_spec(self.checkpoint, tensor_parallel, rank, quantization, expert_parallel)
        precision = parse_quantization(quantization)
        stored = max(weight.storage.group for weight in self.weights)
        group = precision.group if precision.format in ("int4", "int8") else max(stored, 1)
        return ShardSpec(self.config, tensor_parallel, rank, group, expert_parallel)

    def adapters(self, sources: Sequence[AdapterSource]) -> tuple[Adapter, ...]:
        """Adapters of this model. CheckpointError where one does not belong to it or cannot be served."""
        assert self.place is not None or not sources, "shapes of no model on disk"
        return open_adapters(sources, self.place, self.config) if self.place else ()

    @property
    def parameters(self) -> int:
        return sum(weight.elements for weight in self.weights)


def read_shapes(path: str) -> Shapes:
    """The shapes of what lies at `path` (as in cluster.yaml). A directory may hold config.json alone.

    Raises CheckpointError where it is no model, or of a family that is not known."""
    found = resolve_model_path(path)
    if found.is_file() or any(found.glob("*.safetensors")):
        checkpoint = open_checkpoint(found)
        weights = _decoder(checkpoint.config, {n: checkpoint.storage(n) for n in checkpoint.shapes})
        return Shapes(checkpoint.config, weights, checkpoint.quantization, checkpoint=checkpoint, place=found)
    fields = read_json(found / "config.json")
    dtype = fields.get("torch_dtype") or fields.get("dtype") or "bfloat16"
    if dtype not in FLOAT_BITS:
        raise fields.fail(f"torch_dtype: one of {', '.join(FLOAT_BITS)} expected, found {dtype!r}")
    config, packing = registry.read_config(found)[0], read_packing(fields)
    specs, plain = decoder_tensors(config), Storage.of_floats(dtype, 0)
    storage = {name: _said_storage(packing, name, spec.shape) or plain for name, spec in specs.items()}
    weights = _decoder(config, storage)
    return Shapes(
        config,
        weights,
        max(weights, key=lambda weight: weight.elements * ("layers" in weight.name)).storage.label,
        unservable=f"{found} {why_pickles(found) or 'holds config.json but no weights (*.safetensors)'}",
        place=found,
    )


def _said_storage(packing: Packing | None, name: str, shape: tuple[int, ...]) -> Storage | None:
    """Of what packers pack: matrices of layers, but for routers."""
    inside = len(shape) == 2 and name not in VOCABULARY and not name.endswith(ROUTERS)
    return said_storage(packing, shape[1]) if inside else None


def _decoder(config: ModelConfig, storage: dict[str, Storage]) -> tuple[Weight, ...]:
    """A decoder's weights, those of all layers and experts that are alike together. An embedding that is not also the head
    is read one row per token."""
    counts = Counter[Weight]()
    for name, spec in decoder_tensors(config).items():
        read = 1 / config.vocab if name == EMBEDDING and not config.tie_embeddings else 1.0
        if spec.split == "experts" and config.experts is not None:
            read = config.experts.routing.top_k / config.experts.count
        cols = spec.shape[1] if len(spec.shape) == 2 else 1
        alike = re.sub(r"\.\d+\.", ".N.", name)
        counts[Weight(alike, spec.shape[0], cols, spec.split, storage[name], read=read)] += 1
    return tuple(replace(weight, count=count) for weight, count in counts.items())
