"""The FlmError tree on the wire: one gRPC status for each error, and the same error back at the client.

The status carries google.rpc details: ErrorInfo (which class of the tree it was), RetryInfo where waiting helps,
BadRequest where a field is wrong. Anything outside the tree is our bug: it is logged and becomes INTERNAL.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Iterable
from itertools import accumulate
from typing import Any, NoReturn, TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2

from flm.worker import errors
from flm.worker.errors import FlmError, InternalError, InvalidRequest

log = logging.getLogger(__name__)

DETAILS_KEY = "grpc-status-details-bin"
DOMAIN = "flm-cluster"
# gRPC peers refuse trailers of 8 KiB: a message, which is percent-encoded there, and up to five of the other texts,
# which are in base64 with the message, stay below that together.
_MAX_MESSAGE = 1500  # bytes, percent-encoded
_MAX_TEXT = 500  # bytes of UTF-8
_ATTRIBUTES = ("field", "message", "file", "line")  # of the tree's errors, all plain
_CLASSES: dict[str, type[FlmError]] = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, FlmError)
}
# A status that another program made (grpc itself, a proxy) has no ErrorInfo: the plainest class of its code.
_BY_CODE: dict[str, type[FlmError]] = {
    cls.code: cls
    for cls in (
        errors.CheckpointError,
        errors.NotFound,
        errors.Unauthenticated,
        errors.PermissionDenied,
        errors.Overloaded,
        errors.DeadlineExceeded,
        errors.Cancelled,
        errors.Unavailable,
        errors.Lost,
        errors.InvalidRequest,
    )
}
Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])


def to_status(error: FlmError) -> status_pb2.Status:
    """The status with its details."""
    code: int = getattr(grpc.StatusCode, error.code).value[0]
    status = status_pb2.Status(code=code, message=_clipped(str(error), _MAX_MESSAGE, escaped=3))
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN)
    for name in _ATTRIBUTES:
        if hasattr(error, name):
            info.metadata[name] = _clipped(str(getattr(error, name)), _MAX_TEXT)
    status.details.add().Pack(info)
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(retry_after * 1e9))
        status.details.add().Pack(retry)
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_clipped(error.field, _MAX_TEXT), description=_clipped(error.message, _MAX_TEXT)
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    return status


def _clipped(text: str, limit: int, escaped: int = 1) -> str:
    """The beginning of a text that takes at most `limit` bytes, where those outside of printable ASCII take `escaped`
    each. Lone surrogates, which no message can hold, become question marks."""
    data = text.encode("utf-8", "replace")
    sizes = accumulate(1 if 0x20 <= byte < 0x7F and byte != 0x25 else escaped for byte in data)
    kept = next((index for index, size in enumerate(sizes) if size > limit), len(data))
    return data[:kept].decode("utf-8", "ignore")


def from_status(status: status_pb2.Status) -> FlmError:
    """The error that `to_status` was given; for foreign statuses the nearest one of the tree."""
    code = next(c for c in grpc.StatusCode if c.value[0] == status.code)
    cls = _BY_CODE.get(code.name, InternalError)
    attributes: dict[str, Any] = {}
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            if info.domain == DOMAIN and info.reason in _CLASSES:
                cls = _CLASSES[info.reason]
                attributes |= {name: info.metadata[name] for name in _ATTRIBUTES if name in info.metadata}
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            attributes["retry_after"] = retry.retry_delay.ToNanoseconds() / 1e9
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            for violation in bad.field_violations[:1]:
                attributes |= {"field": violation.field, "message": violation.description}
    return _rebuild(cls, status.message, attributes)


def _rebuild(cls: type[FlmError], message: str, attributes: dict[str, Any]) -> FlmError:
    """Constructors of the tree compose their messages; here the message is already composed."""
    if issubclass(cls, InvalidRequest):
        attributes = {"field": "request", "message": message} | attributes
    if issubclass(cls, errors.Overloaded | errors.Unavailable):
        attributes = {"retry_after": 1.0} | attributes
    if "line" in attributes:
        attributes["line"] = int(attributes["line"])
    error = cls.__new__(cls, message)
    Exception.__init__(error, message)
    vars(error).update(attributes)
    return error


def from_rpc_error(error: grpc.RpcError) -> FlmError:
    """The typed error behind what a stub raised, of grpc or of grpc.aio."""
    call: Any = error  # both kinds carry code, details and trailing_metadata
    metadata: Iterable[tuple[str, Any]] = call.trailing_metadata() or ()
    for key, value in metadata:
        if key == DETAILS_KEY:
            return from_status(status_pb2.Status.FromString(value))
    code: grpc.StatusCode = call.code()
    return from_status(status_pb2.Status(code=code.value[0], message=call.details() or code.name))


def from_status_bytes(data: bytes) -> FlmError:
    """The error of a serialised google.rpc.Status."""
    return from_status(status_pb2.Status.FromString(data))


async def abort(context: grpc.aio.ServicerContext, error: FlmError) -> NoReturn:
    """End a call with `error`."""
    status = to_status(error)
    code = getattr(grpc.StatusCode, error.code)
    await context.abort(code, status.message, ((DETAILS_KEY, status.SerializeToString()),))
    raise AssertionError("abort() returned")


def typed_errors(method: Method) -> Method:
    """Decorate a coroutine method of a servicer: what it raises ends the call with the right status."""

    @functools.wraps(method)
    async def wrapper(servicer: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await method(servicer, request, context)
        except FlmError as error:
            if isinstance(error, InternalError):
                log.error("%s: %s", method.__qualname__, error)
            await abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            log.exception("%s failed", method.__qualname__)
            await abort(context, InternalError(f"{type(error).__name__}: {error}"))

    return wrapper  # type: ignore[return-value]
