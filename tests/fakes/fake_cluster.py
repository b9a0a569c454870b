"""A cluster without engines: real gRPC servers on loopback over replicas that compute their tokens by arithmetic."""

from __future__ import annotations

import asyncio
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from flm.cluster.gateway.gateway import Gateway, ReplicaRoute
from flm.cluster.gateway.router import ReplicaView
from flm.cluster.prompts.prompt_formats import CHATML
from flm.cluster.replica.replica_service import ReplicaServer
from flm.worker.errors import InvalidRequest, Overloaded, Unavailable
from flm.worker.request import FinishReason, Request, Timings, TokenEvent, TokenLogprobs
from flm.worker.scheduling.scheduler import Load
from flm.worker.vocabularies.library import LibraryVocabulary
from flm.worker.vocabularies.tokenizer import Tokenizer

CORPUS = "Grüße aus Köln! 世界 is wide — 😀 and «more» to say; żółw, naïve café.\n".encode()
EOS = 256
MAX_CONTEXT = 512
MODEL = str(Path(__file__).parents[1] / "data" / "golden" / "llama2")  # without a tokenizer
KEY = "the cluster's own"  # between gateway and replicas


def byte_tokenizer() -> Tokenizer:
    """Token i is byte i; 256 ends a text."""
    table = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = [b for b in range(256) if chr(b) not in table]
    names = {b: chr(b) if chr(b) in table else chr(256 + others.index(b)) for b in range(256)}
    inner = RustTokenizer(models.BPE(vocab={name: b for b, name in names.items()}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<eos>", special=True)])
    return Tokenizer(LibraryVocabulary(inner), eos_token="<eos>", chat_template=CHATML)


def expected_tokens(prompt_ids: Sequence[int], seed: int, temperature: float = 1.0) -> list[int]:
    """What every fake replica generates when nothing goes wrong: bytes of the corpus from a place that prompt
    and seed decide, then the end."""
    start = zlib.crc32(bytes(t % 256 for t in prompt_ids)) + (seed if temperature else 0)
    length = 40 + start % 30
    return [CORPUS[(start + i) % len(CORPUS)] for i in range(length)] + [EOS]


@dataclass(eq=False)
class Running:
    request: Request
    script: list[int]
    done: int


@dataclass(eq=False)
class FakeReplica:
    """Steps every `step_seconds` in a thread of its own, as the worker's Replica does."""

    step_seconds: float = 0.002
    max_running: int = 64
    state: str = "ready"
    failure: str = ""
    step: int = 0
    hung: bool = False
    began: float = 0.0  # of a step that takes long, monotonic
    at_work: bool = False
    hold_after: int | None = None  # tokens of a request after which it waits
    lose_last: bool = False  # fail with the last token of a request that ends by length
    accepted: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    running: dict[str, Running] = field(default_factory=dict)
    first_cached: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._on_events: Callable[[list[TokenEvent]], None] = lambda events: None
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def start(self, on_events: Callable[[list[TokenEvent]], None]) -> None:
        self._on_events = on_events
        self._thread.start()

    def submit(self, request: Request) -> None:
        with self._lock:
            if self.state != "ready":
                raise Unavailable(f"this replica is {self.state}")
            if len(self.running) >= self.max_running:
                raise Overloaded("the queue is full", retry_after=0.25)
            script = expected_tokens(request.prompt_ids, request.params.seed, request.params.temperature)
            done = len(request.resumed_ids)
            if list(request.resumed_ids) != script[:done]:
                raise InvalidRequest("resumed_ids", "these are not the tokens that were generated before")
            self.accepted.append(request)
            self.running[request.request_id] = Running(request, script, done)

    def cancel(self, request_id: str) -> None:
        with self._lock:
            if self.running.pop(request_id, None):
                self.cancelled.append(request_id)

    def fail(self, why: str) -> None:
        """As when a rank dies."""
        with self._lock:
            self.state, self.failure = "failed", why
            ids, self.running = list(self.running), {}
        self._on_events([TokenEvent(i, finish_reason=FinishReason.ERROR, error=why) for i in ids])

    def not_finite(self, why: str) -> None:
        """As when no token can be drawn for any of its requests."""
        with self._lock:
            ids, self.running = list(self.running), {}
        self._on_events([TokenEvent(i, finish_reason=FinishReason.NOT_FINITE, error=why) for i in ids])

    def rebuilt(self) -> None:
        self.state, self.failure = "ready", ""

    def load(self) -> Load:
        return Load(running=len(self.running))

    def expert_counts(self) -> dict[int, list[int]]:
        return {}

    def step_age(self) -> float:
        return time.monotonic() - self.began if self.began else 0.0

    def still(self) -> float:
        """Of a step that is under way and whose ranks work, a moment."""
        return 0.01 if self.began and self.at_work else self.step_age()

    def stop(self) -> None:
        self.state = "stopped"
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        while self.state != "stopped":
            time.sleep(self.step_seconds)
            if self.hung:
                continue
            with self._lock:
                hold = float("inf") if self.hold_after is None else self.hold_after
                events = [self._advance(r) for r in list(self.running.values()) if r.done < hold]
            self.step += 1
            if self.lose_last and any(e.finish_reason for e in events):
                events = [
                    replace(e, finish_reason=FinishReason.ERROR, error="lost") if e.finish_reason else e
                    for e in events
                ]
            if events:
                self._on_events(events)

    def _advance(self, running: Running) -> TokenEvent:
        request, params = running.request, running.request.params
        token = running.script[running.done]
        running.done += 1
        reason, stop_token = None, None
        if token == EOS or token in params.stop_token_ids:
            reason, stop_token = FinishReason.STOP, token
        elif running.done >= params.max_tokens or running.done + len(request.prompt_ids) >= MAX_CONTEXT:
            reason = FinishReason.LENGTH
        if reason:
            del self.running[request.request_id]
        logprobs: tuple[TokenLogprobs, ...] = ()
        if params.logprobs is not None and stop_token is None:
            top = tuple((t, -float(t)) for t in range(65, 65 + params.logprobs))
            logprobs = (TokenLogprobs(token, -0.5, top),)
        return TokenEvent(
            request.request_id,
            () if stop_token is not None else (token,),
            logprobs,
            reason,
            stop_token,
            len(request.prompt_ids),
            self.first_cached,
            running.done,
            Timings(0.001, 0.002, 0.003 if reason else 0.0),
        )


class Cable:
    """A TCP hop that can be cut, as a killed process' sockets are."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.address = ""

    async def plug(self, port: int = 0) -> str:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", port)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self.address

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, far_writer}
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            pump = asyncio.create_task(_pump(source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def cut(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        await asyncio.gather(*self._pumps, return_exceptions=True)


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
    except ConnectionError:
        pass  # cut
    sink.close()


@dataclass(eq=False)
class Seat:
    """One replica with its server and the cable to it."""

    replica_id: str
    replica: FakeReplica
    server: ReplicaServer
    cable: Cable
    state: str = "ready"

    @property
    def route(self) -> ReplicaRoute:
        return ReplicaRoute(self.replica_id, self.cable.address, self.state)


def streams_of(server: ReplicaServer) -> int:
    """Requests that a replica's port carries."""
    return len(server._service.streams) if server._service else 0


class FakeCluster:
    """A gateway over fake replicas of the model "m"."""

    def __init__(self, gateway: Gateway, address: str) -> None:
        self.gateway, self.address = gateway, address
        self.seats: list[Seat] = []

    async def add(self, replica: FakeReplica | None = None) -> Seat:
        replica = replica or FakeReplica()
        replica_id = f"m-{len(self.seats)}"
        server = ReplicaServer(replica, replica_id, KEY)
        cable = Cable(await server.start())
        await cable.plug()
        self.seats.append(Seat(replica_id, replica, server, cable))
        self.push()
        return self.seats[-1]

    def push(self) -> None:
        self.gateway.set_routes("m", [seat.route for seat in self.seats])

    async def settled(self) -> None:
        """Wait until no stream is left anywhere: cancellations have arrived, nothing leaks."""
        async with asyncio.timeout(60):
            while self.waiting_or_served() or any(
                s.replica.running or streams_of(s.server) for s in self.seats
            ):
                await asyncio.sleep(0.005)

    def waiting_or_served(self) -> int:
        """Streams of clients that the gateway has."""
        replicas = self.gateway._models["m"].replicas
        return len(replicas._waiters) + sum(link.streams for link in replicas._links.values())

    def views(self) -> list[ReplicaView]:
        """The replicas as the gateway sees them."""
        return list(self.gateway._models["m"].replicas.router.replicas.values())

    def by_running(self) -> list[Seat]:
        """Seats, those that run most requests first."""
        return sorted(self.seats, key=lambda seat: -len(seat.replica.running))

    async def close(self) -> None:
        await self.gateway.stop(0)
        for seat in self.seats:
            await seat.server.stop(0)
            await seat.cable.cut()
            seat.replica.stop()
