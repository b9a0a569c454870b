"""Flight: a step that was planned and has no result yet, and for whom it computes.

While a step is under way its sequences count as having computed what it computes, and as having the tokens that it
draws, though nobody on the leader knows them. By the time its result comes, a sequence may have ended, or have been
preempted and wait.
"""

from __future__ import annotations

from collections.abc import Iterator

from flm.worker.plan import Scheduled, StepPlan
from flm.worker.scheduling.sequence import Sequence


class Flight:
    """`sequences`: whom the items of plan.scheduled are for, in their order."""

    def __init__(self, plan: StepPlan, sequences: list[Sequence]) -> None:
        self.plan = plan
        # a list of its own: ranks may sort the plan's
        self._work = list(zip(plan.scheduled, sequences, strict=True))
        for item, sequence in self._work:
            sequence.num_computed = item.num_computed + item.num_tokens
            sequence.in_flight += 1
            sequence.assumed += item.sample

    def land(self) -> Iterator[tuple[Scheduled, Sequence]]:
        """Each item and its sequence, for which it is no longer under way; a token that it drew is to be appended next."""
        for item, sequence in self._work:
            sequence.in_flight -= 1
            sequence.assumed -= item.sample
            yield item, sequence
