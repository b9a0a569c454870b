"""Eight streams at once, half of them greedy and half sampled with seeds, some through an adapter, and what came of each."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from running_cluster import ADAPTER

from flm.cluster.client import Client, Sampling
from flm.proto import flm_pb2

SUBJECTS = ("sea", "moon", "king", "tree", "dog", "road", "river", "clock")


@dataclass
class Outcome:
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    restarts: int = 0
    sequences: list[int] = field(default_factory=list)
    last: flm_pb2.GenerateFrame | None = None
    error: Exception | None = None

    def read(self, client: Client, number: int, tokens: int) -> None:
        sampling = Sampling(
            max_tokens=tokens, temperature=0.0 if number % 2 == 0 else 0.9, seed=100 + number, ignore_eos=True
        )
        try:
            for frame in client.generate(
                f"Tell a story about the {SUBJECTS[number]}.",
                sampling,
                adapter=ADAPTER if number % 4 > 1 else "",
                timeout=120,
            ):
                self.token_ids += frame.token_ids
                self.text += frame.text
                self.restarts = max(self.restarts, frame.restarts)
                self.sequences.append(frame.sequence)
                self.last = frame
        except Exception as error:  # reported by the test that waits for this thread
            self.error = error


class Streams:
    """Start all eight; `wait` for their outcomes."""

    def __init__(self, client: Client, tokens: int) -> None:
        self.tokens = tokens
        self.outcomes = [Outcome() for _ in SUBJECTS]
        self._threads = [
            threading.Thread(target=outcome.read, args=(client, number, tokens))
            for number, outcome in enumerate(self.outcomes)
        ]
        for thread in self._threads:
            thread.start()

    def wait_until_running(self) -> None:
        """Every stream has given a few tokens, and none has ended."""
        deadline = time.monotonic() + 60
        while not all(len(outcome.token_ids) >= 8 for outcome in self.outcomes):
            assert time.monotonic() < deadline, [(len(o.token_ids), o.error) for o in self.outcomes]
            time.sleep(0.01)
        ended = [outcome.last is not None and bool(outcome.last.finish_reason) for outcome in self.outcomes]
        assert not any(ended), [(len(o.token_ids), o.restarts) for o in self.outcomes]

    def wait(self) -> list[Outcome]:
        """Outcomes, each complete, whole and without gaps."""
        for thread in self._threads:
            thread.join(timeout=150)
        for outcome in self.outcomes:
            assert outcome.error is None, outcome.error
            assert outcome.last is not None
            assert outcome.last.finish_reason == flm_pb2.FINISH_REASON_LENGTH
            assert len(outcome.token_ids) == self.tokens == outcome.last.usage.completion_tokens
            assert outcome.sequences == list(range(len(outcome.sequences)))
        return self.outcomes
