"""One rank of a replica group: load the shard, join the group, serve.

The same steps whatever carries the rank: a Ray actor, a thread of `Engine`, a process of a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from flm.kernels.backend import Backend
from flm.kernels.errors import DeviceMemoryFull, KernelError
from flm.worker.adapter import AdapterSource, open_adapters
from flm.worker.blocks import BlockPool
from flm.worker.caches import block_bytes, kv_blocks_for, kv_dtype, make_caches
from flm.worker.channel import (
    FollowerChannel,
    LeaderChannel,
    NoFollowers,
    ZmqFollowerChannel,
    ZmqLeaderChannel,
)
from flm.worker.checkpoint import Checkpoint, open_checkpoint
from flm.worker.comm import Communicator, LocalCommunicator, connect_processes
from flm.worker.errors import BackendUnavailable, ConfigError, DoesNotFit, FlmError, InvalidRequest
from flm.worker.limits import HANG_TIMEOUT, Limits
from flm.worker.model import Decoder
from flm.worker.paths import resolve_model_path
from flm.worker.replica import Replica, as_flm_error
from flm.worker.runner import Runner
from flm.worker.scheduler import Scheduler
from flm.worker.weights import load_weights, shard_spec


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
    kv_dtype: str = "auto"
    kv_bytes: int = 1 << 30  # per rank, at most
    max_context: int = 0  # 0: what the checkpoint was trained for
    max_sequences: int = 64
    max_step_tokens: int = 512
    max_queue: int = 256
    block_size: int = 16
    threads: int = 1  # per rank
    hang_timeout: float = HANG_TIMEOUT
    run_dir: str = ""  # sockets and shared memory of this start of the group; empty for one rank
    adapters: tuple[AdapterSource, ...] = ()
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


class Rank:
    """Rank `rank` of the group, in this process. Call load, connect, then start `replica` (rank 0) or serve."""

    def __init__(self, spec: GroupSpec, rank: int) -> None:
        self.spec, self.rank = spec, rank
        self._replica: Replica | None = None
        self._channel: FollowerChannel | None = None
        self._comm: Communicator = LocalCommunicator()

    def load(self, on_progress: Callable[[float], None]) -> None:
        """Read this rank's weights into the backend's layout; on_progress gets 0 to 1. Raises FlmError."""
        spec = self.spec
        path = resolve_model_path(spec.path)
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self._adapters = open_adapters(spec.adapters, path, self.checkpoint.config)
        self.shard = shard_spec(
            self.checkpoint, spec.tensor_parallel, self.rank, spec.quantization, spec.expert_parallel
        )
        self.max_context = _context(spec, self.checkpoint.config.max_position)
        try:
            self.backend = open_backend(spec.device, spec.threads)
        except KernelError as error:  # no OpenMP, or more threads than numba was started with
            raise BackendUnavailable(f"device {spec.device}: {error}") from error
        self._kv_dtype = kv_dtype(spec.kv_dtype, self.backend)
        self.num_blocks = self._count_blocks()
        try:
            self._fill_memory(on_progress)
        except (DeviceMemoryFull, MemoryError) as error:
            kv = self.num_blocks * block_bytes(self.shard, spec.block_size, self._kv_dtype)
            planned = f"{kv / 2**20:,.0f} MiB of KV cache ({self.num_blocks * spec.block_size:,} tokens)"
            raise DoesNotFit(f"model {spec.model} rank {self.rank}, with {planned}: {error}") from error

    def _fill_memory(self, on_progress: Callable[[float], None]) -> None:
        spec = self.spec
        self._caches = make_caches(
            self.backend,
            self.shard,
            self.num_blocks,
            spec.block_size,
            self._kv_dtype,
            spec.max_sequences,
        )
        weights = load_weights(self.checkpoint, self.shard, spec.quantization, on_progress)
        self.model = Decoder(
            weights,
            self.backend,
            self._comm,
            self._caches,
            positions=self.max_context,
            max_tokens=max(self.step_tokens, spec.max_sequences),
            max_rows=spec.max_sequences,
            adapters=self._adapters,
        )

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, with room for a whole prompt beside all decodes where prompts may not be cut."""
        if self.shard.model.attention.prefix is None:
            return self.spec.max_step_tokens
        return max(self.spec.max_step_tokens, self.max_context + self.spec.max_sequences)

    def _count_blocks(self) -> int:
        spec = self.spec
        most = spec.max_sequences * -(-self.max_context // spec.block_size)
        blocks = kv_blocks_for(self.shard, spec.block_size, self._kv_dtype, spec.kv_bytes, most)
        if blocks * spec.block_size < min(self.max_context, 2 * spec.block_size):
            raise DoesNotFit(
                f"model {spec.model}: kv_cache.memory of {spec.kv_bytes} bytes holds {blocks * spec.block_size} tokens; "
                f"at least {2 * spec.block_size} expected"
            )
        return blocks

    def connect(self, timeout: float = 60.0) -> None:
        """Join the other ranks through shared memory and sockets in run_dir. Raises RankFailed."""
        size, run_dir = self.spec.tensor_parallel, Path(self.spec.run_dir)
        if size == 1:
            self.join(LocalCommunicator(attended=self.spec.device != "cuda"), NoFollowers())
            return
        channel = (
            ZmqLeaderChannel(run_dir, size) if self.rank == 0 else ZmqFollowerChannel(run_dir, self.rank)
        )
        try:
            comm = connect_processes(run_dir / "group.shm", self.rank, size, self.backend, timeout)
            self.join(comm, channel)
        except Exception as error:
            raise as_flm_error(error) from error

    def join(self, comm: Communicator, channel: LeaderChannel | FollowerChannel) -> None:
        """Take part in a group that someone else has connected."""
        spec = self.spec
        self._comm = self.model.comm = comm
        self.runner = Runner(
            self.model,
            self.backend,
            block_size=spec.block_size,
            max_context=self.max_context,
            max_sequences=spec.max_sequences,
            max_tokens=max(self.step_tokens, spec.max_sequences),
            leader=self.rank == 0,
            capture=spec.capture,
        )
        self.runner.capture_ahead()  # compiles what has not been yet: ranks wait for the slowest
        comm.set_timeout(spec.hang_timeout)
        if self.rank > 0:
            self._channel = channel  # type: ignore[assignment]
            return
        names = tuple(source.name for source in spec.adapters)
        limits = Limits(spec.max_sequences, self.step_tokens, spec.max_queue, self.max_context, names)
        pool = BlockPool(self.num_blocks, spec.block_size)
        config = self.checkpoint.config
        scheduler = Scheduler(pool, limits, config.eos_token_ids, config.vocab, config)
        self._replica = Replica(scheduler, self.runner, channel, config, self.max_context)  # type: ignore[arg-type]

    @property
    def replica(self) -> Replica:
        """The leader's loop, not yet started; rank 0 only, after connect."""
        assert self._replica is not None, "only rank 0 has one, after connect()"
        return self._replica

    def serve(self) -> None:
        """A follower's loop: run plans until the leader says stop. Raises FlmError when a step fails, after
        telling the leader why and releasing every rank from its collective."""
        assert self._channel is not None, "followers serve, after connect()"
        while (plan := self._channel.receive()) is not None:
            try:
                self.runner.run(plan)
            except Exception as error:
                failure = as_flm_error(error)
                self._channel.fail(str(failure))
                self._comm.abort()
                raise failure from error

    def close(self) -> None:
        """Stop serving; safe to call more than once and in any state."""
        if self._replica is not None:
            self._replica.stop()
        self._comm.abort()


def open_backend(device: str, threads: int) -> Backend:
    """The backend of a device name. "reference" is the slow NumPy specification of every op.

    Casts, because a backend takes back only weights and caches of its own making, which the protocol cannot say.
    """
    if device == "cpu":
        from flm.kernels.cpu.backend import CpuBackend

        return cast(Backend, CpuBackend(threads=threads))
    if device == "cuda":
        from flm.kernels.cuda.backend import CudaBackend
        from flm.kernels.cuda.device import CupyDevice

        return cast(Backend, CudaBackend(CupyDevice()))
    if device == "reference":
        from flm.kernels.reference import ReferenceBackend

        return cast(Backend, ReferenceBackend())
    raise FlmError(f"device {device!r}: expected cpu or cuda")


def _context(spec: GroupSpec, trained: int) -> int:
    if spec.max_context > trained:
        raise InvalidRequest(
            "max_context", f"expected at most {trained}, the model's own, got {spec.max_context}"
        )
    return spec.max_context or trained
