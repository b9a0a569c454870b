"""Events in the foreground: shown over a controller's lives, and never a reason to stop serving."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import pytest

from flm.cluster.cli.events import follow
from flm.cluster.client import admin_client
from flm.cluster.state import Endpoint
from flm.proto import flm_pb2
from flm.worker.errors import FlmError, InternalError, Unauthenticated, Unavailable


class Lives:
    """An AdminClient whose streams end one after the other: with an error, or by themselves."""

    def __init__(self, *ends: FlmError | None) -> None:
        self.ends = list(ends)

    def __call__(self, address: str, api_key: str) -> Lives:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def events(self, replay: bool) -> Iterator[flm_pb2.Event]:
        yield flm_pb2.Event(kind="scaled", message=f"{len(self.ends)} left")
        end = self.ends.pop(0)
        if end is not None:
            raise end


@pytest.mark.parametrize("last", [InternalError("a bug"), Unauthenticated("wrong key")])
def test_a_controller_that_comes_back_is_followed_and_other_errors_are_said(
    monkeypatch: pytest.MonkeyPatch, last: FlmError
) -> None:
    monkeypatch.setattr(admin_client, "AdminClient", Lives(Unavailable("gone"), None, last))
    shown: list[str] = []
    pauses: list[float] = []
    follow(Endpoint("x", "h:1", "h:2"), shown.append, pauses.append)
    assert [line.partition(" ")[2] for line in shown[:3]] == [f"scaled: {n} left" for n in (3, 2, 1)]
    assert shown[3:] == [f"Events are not shown any more: {last}"]
    assert len(pauses) == 2
