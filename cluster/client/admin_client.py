"""The operators' side of flm.v1.Admin: one blocking call per method, typed errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from flm.cluster.wire.grpc_errors import from_rpc_error
from flm.cluster.wire.listen import CHANNEL_OPTIONS, bearer
from flm.proto import flm_pb2, flm_pb2_grpc
from flm.worker.errors import Unavailable

WAIT = 15.0  # seconds for the controller to come back after a crash


class AdminClient:
    """Calls wait up to `wait` seconds for a controller that is starting; Unavailable where none answers."""

    def __init__(self, address: str, api_key: str = "", wait: float = WAIT) -> None:
        self._address, self._wait = address, wait
        self._metadata = bearer(api_key)
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = flm_pb2_grpc.AdminStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def status(self) -> flm_pb2.ClusterStatus:
        return self._call(self._stub.GetClusterStatus, flm_pb2.GetClusterStatusRequest())

    def scale(self, model: str, replicas: int) -> int:
        """How many were wanted before."""
        answer = self._call(self._stub.Scale, flm_pb2.ScaleRequest(model=model, replicas=replicas))
        return int(answer.previous)

    def drain(self, replica_id: str) -> None:
        self._call(self._stub.Drain, flm_pb2.DrainRequest(replica_id=replica_id))

    def restart(self, replica_id: str) -> None:
        self._call(self._stub.RestartReplica, flm_pb2.RestartReplicaRequest(replica_id=replica_id))

    def shutdown(self, drain_timeout: float | None, timeout: float) -> None:
        """Returns once no rank is left. drain_timeout: seconds for streams to finish, None: the models' own; timeout:
        of the call, which has to outlast them."""
        self._call(self._stub.Shutdown, flm_pb2.ShutdownRequest(drain_timeout=drain_timeout), timeout)

    def events(self, replay: bool) -> Iterator[flm_pb2.Event]:
        """Until the controller ends. Unavailable where there is none."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout=self._wait)
        except grpc.FutureTimeoutError:
            raise self._nobody(self._wait) from None
        try:
            yield from self._stub.WatchEvents(
                flm_pb2.WatchEventsRequest(replay=replay), metadata=self._metadata, wait_for_ready=True
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def _call(self, method: Callable[..., Any], request: Any, timeout: float | None = None) -> Any:
        seconds = self._wait if timeout is None else timeout
        try:
            return method(request, timeout=seconds, metadata=self._metadata, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise self._nobody(seconds) from None
            raise from_rpc_error(error) from None

    def _nobody(self, seconds: float) -> Unavailable:
        return Unavailable(f"no answer from the controller at {self._address} within {seconds:g} s")
