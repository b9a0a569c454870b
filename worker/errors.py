"""The one error tree. Every error a user can meet is an `FlmError` with a gRPC status name.

`worker` knows nothing of gRPC: `code` is only the status' name; `cluster.grpc_errors` turns it into
a status with google.rpc details. An error not in this tree is a bug of ours and becomes INTERNAL.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class FlmError(Exception):
    """Base of all errors meant for users; `code` is the name of the gRPC status it maps to. Where `permanent`, trying the
    same again on the same machine meets it again, until somebody changes something."""

    code: str = "INTERNAL"
    permanent: ClassVar[bool] = False


class InvalidRequest(FlmError):
    """A request field is wrong. `field` names it as the proto does, e.g. `sampling.temperature`."""

    code = "INVALID_ARGUMENT"
    permanent = True

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class ConfigError(FlmError):
    """A configuration file is wrong: where (file, line, field), what, and what was expected."""

    code = "INVALID_ARGUMENT"
    permanent = True

    def __init__(self, message: str, *, file: str = "", line: int = 0, field: str = "") -> None:
        place = f"{file}:{line}" if line else file
        super().__init__(": ".join(part for part in (place, field, message) if part))
        self.file, self.line, self.field, self.message = file, line, field, message


class CheckpointError(FlmError):
    """A checkpoint is missing, truncated, corrupt or of an unsupported kind."""

    code = "FAILED_PRECONDITION"
    permanent = True

    def __init__(self, file: str, message: str) -> None:
        super().__init__(f"{file}: {message}")
        self.file = file


class NotFinite(FlmError):
    """A model computed logits from which no token can be drawn: they have a NaN, or the largest is infinite. It would do
    so on any replica."""

    code = "FAILED_PRECONDITION"


class BackendUnavailable(FlmError):
    """This machine lacks something the kernels need; the message says what to install."""

    code = "FAILED_PRECONDITION"
    permanent = True


class DoesNotFit(FlmError):
    """The plan needs more memory, cores or devices than the hardware has."""

    code = "FAILED_PRECONDITION"
    permanent = True


class OutOfMemory(DoesNotFit):
    """Memory that sufficed while a rank loaded ran out later: started again, it may last."""

    permanent = False


class ModelNotFound(FlmError):
    code = "NOT_FOUND"

    def __init__(self, name: str, known: list[str]) -> None:
        served = ", ".join(sorted(known)) or "none"
        super().__init__(f"model {name!r} is not served here; served models: {served}")


class AdapterNotFound(FlmError):
    code = "NOT_FOUND"

    def __init__(self, name: str, known: Iterable[str]) -> None:
        served = ", ".join(sorted(known)) or "none"
        super().__init__(f"adapter {name!r} is not served with this model; served adapters: {served}")


class NotFound(FlmError):
    """A named thing other than a model (a replica) does not exist."""

    code = "NOT_FOUND"


class Unauthenticated(FlmError):
    code = "UNAUTHENTICATED"


class PermissionDenied(FlmError):
    code = "PERMISSION_DENIED"


class Overloaded(FlmError):
    """The queue is full; the client should come back after `retry_after` seconds."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(FlmError):
    code = "DEADLINE_EXCEEDED"


class Cancelled(FlmError):
    code = "CANCELLED"


class Unavailable(FlmError):
    """No replica can serve now (none ready, draining, rebuilding)."""

    code = "UNAVAILABLE"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RankFailed(Unavailable):
    """A rank of a replica group died, hung or left a collective; the message names the rank."""


class Lost(FlmError):
    """A request was lost and cannot be resumed (the gateway answers ABORTED)."""

    code = "ABORTED"


class InternalError(FlmError):
    code = "INTERNAL"
