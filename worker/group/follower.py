"""What a follower does between plans: it sees the ends of its steps without keeping its device waiting."""

from __future__ import annotations

from flm.worker.communication.channel import FollowerChannel
from flm.worker.execution.runner import Runner

NEXT_PLAN = 0.02  # seconds that the next plan is waited for before the device is


def keep_up(runner: Runner, channel: FollowerChannel) -> None:
    """Collect steps until there is room for the next plan; all of them where none comes soon. Raises what they fail with."""
    while runner.in_flight and not (runner.in_flight <= runner.ahead and channel.expects(NEXT_PLAN)):
        runner.collect()
