"""Reading one stream: text to the terminal as it comes, figures at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flm.proto import flm_pb2

FINISH = {1: "stop", 2: "length", 3: "cancelled", 4: "error"}


@dataclass
class Answer:
    """What came of one request. Times in seconds: first_token and seconds by this client's clock, decode (from the
    first token to the last) by the replica's, for frames may carry several tokens."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    restarts: int = 0
    first_token: float = 0.0
    seconds: float = 0.0
    decode: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first, over the time from the first to the last; 0 where there are fewer than two."""
        return (len(self.token_ids) - 1) / self.decode if self.decode and len(self.token_ids) > 1 else 0.0

    def stats(self) -> str:
        times = "once" if self.restarts == 1 else f"{self.restarts} times"
        moved = f", moved {times}" if self.restarts else ""
        return (
            f"{len(self.token_ids)} tokens, {self.tokens_per_second:.1f} tokens/s, "
            f"first after {self.first_token:.3f} s ({self.prompt_tokens} prompt tokens{moved})"
        )

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "tokens_per_second": self.tokens_per_second}


def read_answer(frames: Iterable[flm_pb2.GenerateFrame], show: Callable[[str], None], began: float) -> Answer:
    """Read a stream to its end; `show` gets each piece of text. `began`: time.perf_counter() before the call, whose first
    frames may be there before this reads."""
    answer = Answer()
    for frame in frames:
        now = time.perf_counter() - began
        if frame.token_ids and not answer.token_ids:
            answer.first_token = now
        if frame.token_ids:
            answer.seconds = now
        answer.token_ids += frame.token_ids
        answer.text += frame.text
        answer.restarts = frame.restarts
        if frame.text:
            show(frame.text)
        if frame.finish_reason:
            answer.finish_reason = FINISH[frame.finish_reason]
            answer.decode = frame.timings.decode
            answer.prompt_tokens, answer.cached_tokens = frame.usage.prompt_tokens, frame.usage.cached_tokens
    return answer


def show_text(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def no_show(text: str) -> None:
    """For --json: nothing before the end."""
