"""GroupSpec: what the ranks of a replica group are told."""

from __future__ import annotations

from dataclasses import dataclass

from flm.worker.adapters.adapter import AdapterSource
from flm.worker.errors import ConfigError
from flm.worker.execution.device_cache import NOTHING_PLANNED, Planned
from flm.worker.limits import HANG_TIMEOUT, Limits


@dataclass(frozen=True)
class GroupSpec:
    """Everything the ranks of one replica group need. Sizes in tokens and bytes; times in seconds. ConfigError where one
    cannot be."""

    replica_id: str
    model: str
    path: str
    device: str = "cpu"
    tensor_parallel: int = 1
    expert_parallel: bool = False  # spread a layer's experts over the ranks, whole
    quantization: str = "auto"
    activations: str = "auto"  # of GPUs: bfloat16 (auto) or float16; CPUs compute in float32
    matmul: str = "exact"  # of GPUs: "cublas" lets that library multiply long prompts, whose bits then depend on the step
    kv_dtype: str = "auto"
    kv_bytes: int = 0  # per rank, at most; 0: 1 GiB of the host's memory, of a GPU's what gpu_memory leaves
    gpu_memory: float = 0.92  # share of a GPU's memory that may be filled
    planned: Planned = NOTHING_PLANNED
    max_context: int = 0  # 0: what the checkpoint was trained for
    max_sequences: int = 64
    max_step_tokens: int = 512
    max_queue: int = 256
    block_size: int = 16
    threads: int = 1  # per rank
    hang_timeout: float = HANG_TIMEOUT
    run_dir: str = ""  # sockets and shared memory of this start of the group; empty for one rank
    adapters: tuple[AdapterSource, ...] = ()
    overlap: bool | None = (
        None  # a step is launched while another runs; None: where devices run beside the host
    )
    capture: bool = True  # False: every op of every step runs eagerly, for comparison

    def __post_init__(self) -> None:
        for name, low in (("tensor_parallel", 1), ("block_size", 16), ("max_context", 0), ("threads", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"expected at least {low}, got {getattr(self, name)}", field=name)
        if self.block_size % 16:
            raise ConfigError(f"expected a multiple of 16, got {self.block_size}", field="block_size")
        if not self.hang_timeout > 0:
            raise ConfigError(f"expected more than 0 seconds, got {self.hang_timeout}", field="hang_timeout")
        Limits(self.max_sequences, self.max_step_tokens, self.max_queue, self.max_context or 2)
