"""Errors cross the wire and come back as they were."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from flm.cluster.client import AsyncClient
from flm.cluster.wire.grpc_errors import from_status, to_status
from flm.worker import errors
from flm.worker.errors import FlmError

SAMPLES = [
    errors.InvalidRequest("sampling.temperature", "expected [0, 100], got nan"),
    errors.ConfigError("expected a number", file="x.yaml", line=3, field="models.0.replicas"),
    errors.CheckpointError("model.gguf", "truncated"),
    errors.NotFinite("model 'm' computed NaN"),
    errors.BackendUnavailable("no OpenMP"),
    errors.DoesNotFit("needs 3 GiB"),
    errors.OutOfMemory("the GPU has no room for 3 MiB more"),
    errors.ModelNotFound("a", ["b"]),
    errors.AdapterNotFound("a", ["b"]),
    errors.NotFound("replica r-1"),
    errors.Unauthenticated("a key"),
    errors.PermissionDenied("no"),
    errors.Overloaded("full", 0.25),
    errors.DeadlineExceeded("late"),
    errors.Cancelled("gone"),
    errors.Unavailable("none ready", 2.5),
    errors.RankFailed("rank 1 died", 1.5),
    errors.Lost("lost"),
    errors.InternalError("bug"),
]


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_round_trip(error: FlmError) -> None:
    back = from_status(status_pb2.Status.FromString(to_status(error).SerializeToString()))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_samples_cover_the_tree() -> None:
    tree = {v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, FlmError)}
    assert tree - {FlmError} == {type(error) for error in SAMPLES}


def test_details() -> None:
    by_type = {detail.type_url: detail for detail in to_status(SAMPLES[0]).details}
    bad = error_details_pb2.BadRequest()
    by_type["type.googleapis.com/google.rpc.BadRequest"].Unpack(bad)
    assert [(v.field, v.description) for v in bad.field_violations] == [
        ("sampling.temperature", "expected [0, 100], got nan")
    ]
    retry = error_details_pb2.RetryInfo()
    to_status(errors.Overloaded("full", 0.25)).details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 250


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c is not grpc.StatusCode.OK])
def test_foreign_statuses(code: grpc.StatusCode) -> None:
    error = from_status(status_pb2.Status(code=code.value[0], message="said a proxy"))
    assert str(error) == "said a proxy"
    expected = (
        code.name
        if code.name not in ("UNKNOWN", "UNIMPLEMENTED", "OUT_OF_RANGE", "DATA_LOSS")
        else "INTERNAL"
    )
    assert error.code == ("INTERNAL" if code.name == "ALREADY_EXISTS" else expected)


@pytest.mark.parametrize("text", ["x" * 100_000, "漢" * 100_000, "%\n" * 100_000, "\udcff漢" * 100_000])
def test_long_texts_fit_into_trailers(text: str) -> None:
    error = errors.InvalidRequest(text, text)
    error.file = text  # type: ignore[attr-defined]
    status = to_status(error)
    message = quote(status.message, safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}")
    assert len(message) + len(base64.b64encode(status.SerializeToString())) < 7800
    assert "\ufffd" not in status.message


async def test_long_texts_of_clients_come_back(start_cluster: Callable[..., Awaitable[Any]]) -> None:
    cluster = await start_cluster()
    async with AsyncClient(cluster.address) as client:
        with pytest.raises(errors.InvalidRequest, match="got '漢漢") as caught:
            await anext(client.chat([{"role": "漢" * 3000, "content": ""}]))
        assert caught.value.field == "messages[0].role"
        with pytest.raises(errors.ModelNotFound, match="漢漢"):
            await client.model_info("漢" * 3000)
