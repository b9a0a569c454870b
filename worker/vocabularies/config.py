"""What the small JSON files beside a vocabulary say: tokenizer_config.json, special_tokens_map.json,
added_tokens.json and the places where chat templates are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flm.worker.errors import CheckpointError
from flm.worker.files.json_fields import Fields, read_json
from flm.worker.vocabularies.base import AddedToken

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerConfig:
    """`fields` are tokenizer_config.json's, those of special_tokens_map.json where it lacks them."""

    directory: Path
    fields: Fields
    added: dict[str, AddedToken] = field(default_factory=dict)
    chat_template: str | None = None
    roles: frozenset[str] = frozenset()  # tokens that are named for what they do: bos_token and its like

    def token(self, name: str) -> str | None:
        """bos_token and its like: a string, or the object that older files keep."""
        value = _content(self.fields.get(name))
        if value is not None and not isinstance(value, str):
            raise self.fields.fail(f"{name}: a token's text expected, found {value!r}")
        return value

    @property
    def kind(self) -> str:
        """The class that the checkpoint names, "" where it names none."""
        value = self.fields.get("tokenizer_class")
        return value if isinstance(value, str) else ""


def read_config(directory: Path) -> TokenizerConfig:
    """Raises CheckpointError where a file that is there is not what it should be."""
    path = directory / "tokenizer_config.json"
    fields = read_json(path) if path.is_file() else Fields(path, {})
    roles = directory / "special_tokens_map.json"
    if roles.is_file():
        given = {key: value for key, value in fields.raw.items() if value is not None}
        fields = Fields(path, read_json(roles).raw | given)
    special = _roles(fields)
    added = _added(directory, fields, special)
    return TokenizerConfig(directory, fields, added, _template(directory, fields), special)


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _roles(fields: Fields) -> frozenset[str]:
    more = fields.get("additional_special_tokens")
    named = [*(fields.get(name) for name in _ROLES), *(more if isinstance(more, list) else ())]
    return frozenset(token for token in map(_content, named) if isinstance(token, str) and token)


def _added(directory: Path, fields: Fields, special: frozenset[str]) -> dict[str, AddedToken]:
    """Tokens beside the vocabulary proper, by how they are spelt."""
    found: dict[str, AddedToken] = {}
    older = directory / "added_tokens.json"
    if older.is_file():
        for spelt, i in read_json(older).raw.items():
            found[spelt] = AddedToken(_id(Fields(older, {}), spelt, i), spelt in special)
    decoder = fields.section("added_tokens_decoder")
    for key, entry in decoder.raw.items() if decoder else ():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not key.isdecimal():
            raise fields.fail(f"added_tokens_decoder[{key!r}]: a token with its content expected")
        found[content] = AddedToken(
            int(key),
            entry.get("special") is True or content in special,
            entry.get("lstrip") is True,
            entry.get("rstrip") is True,
        )
    return {spelt: token for spelt, token in found.items() if spelt}


def _id(fields: Fields, spelt: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise fields.fail(f"{spelt!r}: a token id expected, found {value!r}")
    return value


def _template(directory: Path, fields: Fields) -> str | None:
    for source, value in _templates(directory, fields):
        if isinstance(value, list):  # several named templates
            named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
            value = named.get("default")
        if value is not None and not isinstance(value, str):
            raise source.fail(f"chat_template: a template's text expected, found {type(value).__name__}")
        if value is not None:
            return value
    return None


def _templates(directory: Path, fields: Fields) -> Iterator[tuple[Fields, Any]]:
    """Where a template may be, the newer place first."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            yield Fields(file, {}), file.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise CheckpointError(str(file), f"cannot be read: {error}") from error
    file = directory / "chat_template.json"
    if file.is_file():
        yield Fields(file, {}), read_json(file).get("chat_template")
    yield fields, fields.get("chat_template")
