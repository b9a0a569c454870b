"""Text of a stream of tokens: whole characters, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flm.cluster.gateway.stops import StopMatcher
from flm.worker.vocabularies.tokenizer import IncrementalDecoder


@dataclass(slots=True)
class TextStream:
    """Text of one stream. `matched` is the stop string that ended it, if one did."""

    decoder: IncrementalDecoder
    stops: StopMatcher | None = None

    @property
    def matched(self) -> str | None:
        return self.stops.matched if self.stops else None

    def push(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """The text that these tokens make certain, and how many of them it took: fewer than all of them where
        a stop string is complete before the last."""
        push = self.decoder.push
        if self.stops is None:
            return "".join([push(token) for token in token_ids]), len(token_ids)
        text = ""
        for used, token in enumerate(token_ids, 1):
            text += self.stops.push(push(token))
            if self.stops.matched is not None:
                return text, used
        return text, len(token_ids)

    def finish(self) -> str:
        """What was held back, after the last token."""
        rest = self.decoder.flush()
        if self.stops is None:
            return rest
        text = self.stops.push(rest)
        return text if self.stops.matched is not None else text + self.stops.flush()
