"""Messages as JSON for scripts: enums in plain words, whole numbers as numbers, every field there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.descriptor import EnumDescriptor
    from google.protobuf.message import Message


def plain(message: Message) -> dict[str, Any]:
    """All fields by their names; messages that are absent are None."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            found[field.name] = [_value(field, item) for item in value]
        else:
            absent = field.has_presence and not message.HasField(field.name)
            found[field.name] = None if absent else _value(field, value)
    return found


def word(enum: EnumDescriptor, number: int) -> str:
    """REPLICA_STATE_READY as "ready": names begin with their enum's, as that of number 0, …_UNSPECIFIED, does."""
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    value = enum.values_by_number.get(number)
    return str(number) if value is None else value.name.removeprefix(prefix).lower()


def _value(field: Any, value: Any) -> Any:
    """`field`: its descriptor, of which protobuf has two kinds."""
    if field.message_type is not None:
        return plain(value)
    return value if field.enum_type is None else word(field.enum_type, value)
