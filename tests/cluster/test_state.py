"""What outlives processes is whole or absent, and found again."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from flm.cluster import state
from flm.cluster.state import Desired, Endpoint, ModelFacts
from flm.worker.errors import ConfigError, InvalidRequest, NotFound

DESIRED = Desired(
    "name: x",
    "/x.yaml",
    {"m": 2},
    {"m": ModelFacts(123, 4096, "llama", "Q4_1", eos_token_ids=(2, 7), planned=(1, 2, 3))},
    "a secret",
)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "flm-cluster"


def test_desired_state_comes_back(tmp_path: Path) -> None:
    assert state.load_desired(tmp_path) is None
    state.save_desired(tmp_path, DESIRED.scaled("m", 3))
    assert state.load_desired(tmp_path) == Desired(
        DESIRED.text, DESIRED.file, {"m": 3}, DESIRED.facts, "a secret"
    )


def test_a_write_that_fails_leaves_the_old_state_and_no_litter(tmp_path: Path) -> None:
    state.save_desired(tmp_path, DESIRED)
    with pytest.raises(TypeError):
        state.write_atomic(tmp_path / state.DESIRED, {"text": object()})
    assert state.load_desired(tmp_path) == DESIRED
    assert os.listdir(tmp_path) == [state.DESIRED]


def test_keys_are_their_owners_only(root: Path, tmp_path: Path) -> None:
    state.save_endpoint(Endpoint("a", "h:1", "h:2", gateway_key="secret"))
    state.save_desired(tmp_path, DESIRED)
    for file in (root / "a" / state.ENDPOINT, tmp_path / state.DESIRED):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert DESIRED.replica_key not in repr(DESIRED)


def test_a_state_that_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be kept in .*/file/flm-cluster/a: Not a directory"):
        state.save_endpoint(Endpoint("a", "h:1", "h:2"))


def test_the_only_cluster_needs_no_name() -> None:
    with pytest.raises(NotFound, match="no cluster is running here; start one with `flm-cluster up FILE`"):
        state.find_endpoint()
    state.save_endpoint(Endpoint("a", "h:1", "h:2"))
    assert state.find_endpoint().name == "a"
    state.save_endpoint(Endpoint("b", "h:3", "h:4"))
    assert state.find_endpoint("b").admin == "h:4"
    with pytest.raises(InvalidRequest, match="expected one of a, b"):
        state.find_endpoint()
    with pytest.raises(NotFound, match="cluster 'c' is not running here; running: a, b"):
        state.find_endpoint("c")
    state.forget("b")
    assert state.find_endpoint().name == "a"


def test_starts_are_counted_across_processes(tmp_path: Path) -> None:
    count, first = state.count_start(tmp_path)
    assert count == 0
    assert state.count_start(tmp_path) == (1, first)
