"""Plans reach every follower, by threads and by sockets, and failures come back."""

import threading
from pathlib import Path

import pytest
import zmq

from flm.worker.communication import zmq_channel
from flm.worker.communication.channel import ThreadChannel
from flm.worker.communication.zmq_channel import ZmqFollowerChannel, ZmqLeaderChannel
from flm.worker.errors import RankFailed
from flm.worker.plan import NewSequence, Scheduled, StepPlan
from flm.worker.request import SamplingParams

PLAN = StepPlan(
    7,
    new=[NewSequence(2, [1, 2, 3], 2, 0, [5, 9], SamplingParams(seed=2**63, stop_token_ids=(4,)))],
    scheduled=[Scheduled(2, 0, 3)],
    finished=[1],
)


def test_sockets_carry_plans_stop_and_failures(tmp_path: Path) -> None:
    leader = ZmqLeaderChannel(tmp_path, 3)
    followers = {rank: ZmqFollowerChannel(tmp_path, rank) for rank in (1, 2)}
    leader.send(PLAN)
    for follower in followers.values():
        assert follower.receive() == PLAN
    followers[2].fail("out of memory")
    assert leader.failures(5.0) == {2: "out of memory"}
    leader.stop()
    assert followers[1].receive() is None


def test_plans_sent_before_a_follower_connects_are_not_lost(tmp_path: Path) -> None:
    leader = ZmqLeaderChannel(tmp_path, 2)
    threading.Timer(0.05, leader.send, [PLAN]).start()
    assert ZmqFollowerChannel(tmp_path, 1).receive() == PLAN
    leader.stop()


def test_a_stop_that_comes_before_a_follower_is_not_lost(tmp_path: Path) -> None:
    leader = ZmqLeaderChannel(tmp_path, 2)
    stopping = threading.Thread(target=leader.stop)
    stopping.start()
    follower = ZmqFollowerChannel(tmp_path, 1)
    follower._socket.setsockopt(zmq.RCVTIMEO, 5000)
    assert follower.receive() is None
    stopping.join()


def test_a_follower_that_never_connects_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_channel, "SEND_MS", 100)
    leader = ZmqLeaderChannel(tmp_path, 2)
    with pytest.raises(RankFailed, match="rank 1"):
        leader.send(PLAN)
    leader.stop()


def test_a_follower_is_told_whether_a_plan_is_there(tmp_path: Path) -> None:
    sockets, threads = ZmqLeaderChannel(tmp_path, 2), ThreadChannel(2)
    for leader, follower in ((sockets, ZmqFollowerChannel(tmp_path, 1)), (threads, threads.followers[0])):
        assert not follower.expects(0.001)
        leader.send(PLAN)
        assert follower.expects(5.0)
        assert follower.expects(0.0)
        assert follower.receive() == PLAN
        assert not follower.expects(0.001)
        leader.stop()
        assert follower.expects(5.0)
        assert follower.receive() is None


def test_threads_get_their_own_copy_of_a_plan() -> None:
    leader = ThreadChannel(3)
    leader.send(PLAN)
    received = [follower.receive() for follower in leader.followers]
    assert received == [PLAN, PLAN]
    assert received[0] is not received[1]
    leader.followers[1].fail("broken")
    assert leader.failures(1.0) == {2: "broken"}
    assert leader.failures(0.0) == {}
    leader.stop()
    assert leader.followers[0].receive() is None
