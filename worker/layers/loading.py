"""What layers are made with, and what they are run on.

Shape legend: T tokens of the step, S sequences, B blocks per sequence, P positions, R half the rotary width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flm.kernels.backend import Backend, PackedMatrix
from flm.kernels.stored import StoredMatrix
from flm.worker.adapters.adapter import Adapter
from flm.worker.checkpoints.weights import ModelWeights
from flm.worker.config import ShardSpec

Array = Any


class Workspace:
    """Activations for up to `max_tokens` tokens. Layers run one after another, so those that ask for the same name share
    an array; a step of T tokens uses its first T rows, so that a captured step finds everything where it was."""

    def __init__(self, backend: Backend, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._backend = backend
        self._arrays: dict[tuple[str, tuple[int, ...]], Array] = {}

    def array(self, name: str, *shape: int, dtype: Any = None) -> Array:
        """[max_tokens, *shape], of the backend's activations unless another dtype is said."""
        if (name, shape) not in self._arrays:
            kind = self._backend.activation if dtype is None else dtype
            self._arrays[name, shape] = self._backend.empty((self.max_tokens, *shape), kind)
        return self._arrays[name, shape]


@dataclass(frozen=True)
class Loading:
    """Everything a layer's constructor takes its parts from."""

    weights: ModelWeights
    backend: Backend
    workspace: Workspace
    pack: Callable[[StoredMatrix], PackedMatrix]
    adapters: tuple[Adapter, ...] = ()

    @property
    def shard(self) -> ShardSpec:
        return self.weights.shard

    def vector(self, values: Any) -> Array:
        """A vector on the device; None stays None."""
        return None if values is None else self.backend.asarray(values)


@dataclass(frozen=True)
class StepInputs:
    """Device arrays of one step, int32: ids_T, positions_T, slots_T (cache slot each token is written to), sequence_T
    (row of block_tables_SB), block_tables_SB (block numbers of every known sequence), last_visible_T (the last position
    of its sequence that a token sees) and rotary_rows_T (the row of the rotary tables that it turns by). cos_TR, sin_TR
    and q_scale_T (float32): this step's own tables, None where the model's serve. adapter_T: the number of each token's
    adapter, -1 for none; None where no token has one."""

    ids_T: Array
    positions_T: Array
    slots_T: Array
    sequence_T: Array
    block_tables_SB: Array
    last_visible_T: Array
    rotary_rows_T: Array
    cos_TR: Array | None = None
    sin_TR: Array | None = None
    q_scale_T: Array | None = None
    adapter_T: Array | None = None
