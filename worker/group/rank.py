"""One rank of a replica group: load the shard, join the group, serve.

The same steps whatever carries the rank: a Ray actor, a thread of `Engine`, a process of a test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flm.kernels.errors import CompileError, DeviceMemoryFull, KernelError, LibraryFailed, ToolkitMissing
from flm.worker.adapters.adapter import open_adapters
from flm.worker.checkpoints.checkpoint import Checkpoint, open_checkpoint
from flm.worker.checkpoints.weights import load_weights, shard_spec
from flm.worker.communication.channel import (
    FollowerChannel,
    LeaderChannel,
    NoFollowers,
)
from flm.worker.communication.comm import Communicator, LocalCommunicator, NotYetMet, connect_processes
from flm.worker.errors import (
    BackendUnavailable,
    DoesNotFit,
    InvalidRequest,
    OutOfMemory,
)
from flm.worker.execution.caches import block_bytes, kv_blocks_for, kv_dtype, make_caches
from flm.worker.execution.device_cache import HOST_KV_BYTES, Held, kv_budget, shortage
from flm.worker.execution.model import Decoder
from flm.worker.execution.runner import Runner
from flm.worker.files.paths import resolve_model_path
from flm.worker.group.backends import open_backend
from flm.worker.group.follower import keep_up
from flm.worker.group.group_spec import GroupSpec
from flm.worker.group.replica import Replica, as_flm_error
from flm.worker.limits import Limits
from flm.worker.scheduling.blocks import BlockPool
from flm.worker.scheduling.scheduler import Scheduler

WEIGHTS_SHARE = 0.8  # of the progress of loading, where kernels are compiled after


class Rank:
    """Rank `rank` of the group, in this process. Call load, connect, then start `replica` (rank 0) or serve."""

    def __init__(self, spec: GroupSpec, rank: int) -> None:
        self.spec, self.rank = spec, rank
        self._replica: Replica | None = None
        self._channel: FollowerChannel | None = None
        self._comm: Communicator = LocalCommunicator()

    def load(self, on_progress: Callable[[float], None]) -> None:
        """Read this rank's weights into the backend's layout, and compile kernels; on_progress gets 0 to 1. Raises
        FlmError."""
        spec = self.spec
        path = resolve_model_path(spec.path)
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self._adapters = open_adapters(spec.adapters, path, self.checkpoint.config)
        self.shard = shard_spec(
            self.checkpoint, spec.tensor_parallel, self.rank, spec.quantization, spec.expert_parallel
        )
        self.max_context = _context(spec, self.checkpoint.config.max_position)
        try:
            self.backend = open_backend(spec.device, spec.threads, spec.activations, spec.matmul)
        except KernelError as error:  # no OpenMP, or more threads than numba was started with
            raise BackendUnavailable(f"device {spec.device}: {error}") from error
        self._kv_dtype = kv_dtype(spec.kv_dtype, self.backend)
        self._before = self.backend.memory()
        self._sized_later = self._before is not None and not self.shard.model.attention.recurrent
        self.num_blocks = 1 if self._sized_later else self._count_blocks()
        try:
            self._fill_memory(on_progress)
        except DeviceMemoryFull as error:
            raise DoesNotFit(f"{self._who}, while its weights load: {error}; {spec.planned}") from error
        except MemoryError as error:
            kv = self.num_blocks * block_bytes(self.shard, spec.block_size, self._kv_dtype)
            planned = f"{kv / 2**20:,.0f} MiB of KV cache ({self.num_blocks * spec.block_size:,} tokens)"
            raise DoesNotFit(f"{self._who}, with {planned}: {error}") from error
        except (ToolkitMissing, CompileError, LibraryFailed) as error:
            raise BackendUnavailable(f"device {spec.device}: {error}") from error

    @property
    def _who(self) -> str:
        return f"model {self.spec.model} rank {self.rank}"

    def _fill_memory(self, on_progress: Callable[[float], None]) -> None:
        """Weights, the runner with all it keeps, and compiled kernels."""
        spec, on_gpu = self.spec, self._before is not None
        share = WEIGHTS_SHARE if on_gpu else 1.0
        weights = load_weights(
            self.checkpoint, self.shard, spec.quantization, lambda done: on_progress(done * share)
        )
        if spec.tensor_parallel > 1:
            self._comm = NotYetMet(spec.tensor_parallel)
        self.model = Decoder(
            weights,
            self.backend,
            self._comm,
            self._caches(),
            positions=self.max_context,
            max_tokens=max(self.step_tokens, spec.max_sequences),
            max_rows=spec.max_sequences,
            adapters=self._adapters,
        )
        self._loaded = self.backend.memory()
        self.runner = Runner(
            self.model,
            self.backend,
            block_size=spec.block_size,
            max_context=self.max_context,
            max_sequences=spec.max_sequences,
            max_tokens=max(self.step_tokens, spec.max_sequences),
            leader=self.rank == 0,
            capture=spec.capture,
            ahead=self._ahead,
        )
        self.backend.prepare(
            self.runner.rehearse, spec.tensor_parallel, lambda done: on_progress(share + (1 - share) * done)
        )

    @property
    def _ahead(self) -> int:
        """Steps that are planned before the result of the one before is known."""
        overlap = self.backend.asynchronous if self.spec.overlap is None else self.spec.overlap
        return int(overlap)

    def _caches(self) -> Any:
        spec = self.spec
        return make_caches(
            self.backend,
            self.shard,
            self.num_blocks,
            spec.block_size,
            self._kv_dtype,
            spec.max_sequences,
        )

    def _size_caches(self, comm: Communicator) -> None:
        """Make the caches as large as what is free allows on the rank that has the least of it."""
        spec = self.spec
        assert self._before is not None and self._loaded is not None
        self.runner.rehearse(largest=True)
        here = [
            bus.decode() for bus in comm.swap(self._before.bus.encode())
        ]  # nobody measures before all are there
        sharers = max(here.count(self._before.bus), 1)
        ready = self.backend.memory()
        assert ready is not None
        self.held = Held(self._before, self._loaded, ready)
        per_block = block_bytes(self.shard, spec.block_size, self._kv_dtype)
        sequence = -(-self.max_context // spec.block_size)
        room = kv_budget(self.held, spec.gpu_memory) // sharers // per_block
        wanted = self._count_blocks() if spec.kv_bytes else sequence
        short = shortage(wanted * per_block * sharers, self.held, spec.gpu_memory, spec.planned)
        told = [
            each.decode()
            for each in comm.swap(f"{room} {self._who}: {short}".encode() if short else b"%d" % room)
        ]
        if problems := [said.partition(" ")[2] for said in told if " " in said]:
            raise DoesNotFit("; ".join(problems))
        most = spec.max_sequences * sequence
        self.num_blocks = wanted if spec.kv_bytes else min(most, *map(int, told))
        try:
            self.model.set_caches(self._caches())
        except DeviceMemoryFull as error:
            raise DoesNotFit(
                f"{self._who}, making its KV cache: {error}; {self.held}; {spec.planned}"
            ) from error

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, with room for a whole prompt beside all decodes where prompts may not be cut."""
        if self.shard.model.attention.prefix is None:
            return self.spec.max_step_tokens
        return max(self.spec.max_step_tokens, self.max_context + self.spec.max_sequences)

    def _count_blocks(self) -> int:
        spec = self.spec
        most = spec.max_sequences * -(-self.max_context // spec.block_size)
        kv_bytes = spec.kv_bytes or HOST_KV_BYTES
        blocks = kv_blocks_for(self.shard, spec.block_size, self._kv_dtype, kv_bytes, most)
        if blocks * spec.block_size < min(self.max_context, 2 * spec.block_size):
            raise DoesNotFit(
                f"model {spec.model}: kv_cache.memory of {kv_bytes} bytes holds {blocks * spec.block_size} tokens; "
                f"at least {2 * spec.block_size} expected"
            )
        return blocks

    def connect(self, timeout: float = 60.0) -> None:
        """Join the other ranks through shared memory and sockets in run_dir. Raises RankFailed."""
        spec = self.spec
        size, run_dir = spec.tensor_parallel, Path(spec.run_dir)
        try:
            if size == 1:
                self.join(LocalCommunicator(attended=spec.device != "cuda"), NoFollowers())
                return
            channel = _channel_between_processes(run_dir, self.rank, size)
            comm = connect_processes(run_dir / "group.shm", self.rank, size, self.backend, timeout)
            self.join(comm, channel)
        except Exception as error:
            raise as_flm_error(error) from error

    def join(self, comm: Communicator, channel: LeaderChannel | FollowerChannel) -> None:
        """Take part in a group that someone else has connected."""
        spec = self.spec
        self._comm = self.model.comm = comm
        if self._sized_later:
            self._size_caches(comm)
        self.runner.capture_ahead()
        comm.set_timeout(spec.hang_timeout)
        if self.rank > 0:
            self._channel = channel  # type: ignore[assignment]
            return
        names = tuple(source.name for source in spec.adapters)
        limits = Limits(spec.max_sequences, self.step_tokens, spec.max_queue, self.max_context, names)
        pool = BlockPool(self.num_blocks, spec.block_size)
        config = self.checkpoint.config
        scheduler = Scheduler(pool, limits, config.eos_token_ids, config.vocab, config, self._ahead)
        self._replica = Replica(scheduler, self.runner, channel, config, self.max_context)  # type: ignore[arg-type]
        self._replica.memory_facts = self._memory_facts

    @property
    def _memory_facts(self) -> str:
        """What was measured before the cache was made, beside what was planned."""
        return f"before its KV cache was made {self.held}; {self.spec.planned}" if self._sized_later else ""

    @property
    def cache_facts(self) -> tuple[int, int]:
        """Tokens of the KV cache, and bytes that the rank takes of a GPU, cache included (0 without one); after connect."""
        cache = self.num_blocks * block_bytes(self.shard, self.spec.block_size, self._kv_dtype)
        held = self.held.weights + self.held.workspace + cache if self._sized_later else 0
        return self.num_blocks * self.spec.block_size, held

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
                self.runner.launch(plan)
                keep_up(self.runner, self._channel)
            except Exception as error:
                failure = as_flm_error(error)
                if isinstance(error, DeviceMemoryFull) and self._memory_facts:
                    failure = OutOfMemory(f"{error}; {self._memory_facts}")
                self._channel.fail(str(failure))
                self._comm.abort()
                raise failure from error

    def close(self) -> None:
        """Stop serving; safe to call more than once and in any state."""
        if self._replica is not None:
            self._replica.stop()
        self._comm.abort()


def _channel_between_processes(run_dir: Path, rank: int, size: int) -> LeaderChannel | FollowerChannel:
    # ranks of one process do without ZeroMQ
    from flm.worker.communication.zmq_channel import ZmqFollowerChannel, ZmqLeaderChannel

    return ZmqFollowerChannel(run_dir, rank) if rank else ZmqLeaderChannel(run_dir, size)


def _context(spec: GroupSpec, trained: int) -> int:
    if spec.max_context > trained:
        raise InvalidRequest(
            "max_context", f"expected at most {trained}, the model's own, got {spec.max_context}"
        )
    return spec.max_context or trained
