"""Times of an answer count from before its call."""

from __future__ import annotations

import time

from flm.cluster.cli.answer import no_show, read_answer
from flm.proto import flm_pb2


def test_a_first_token_that_came_before_it_was_read_for_has_taken_its_time() -> None:
    frames = [flm_pb2.GenerateFrame(token_ids=[5], text="a"), flm_pb2.GenerateFrame(finish_reason=1)]
    answer = read_answer(frames, no_show, time.perf_counter() - 2.0)
    assert answer.seconds >= answer.first_token >= 2.0
    assert (answer.text, answer.finish_reason) == ("a", "stop")
