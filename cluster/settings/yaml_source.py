"""YAML with the line of every value: parsing, duplicate keys, and turning pydantic's errors into ours."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from flm.worker.errors import ConfigError

YamlPath = tuple[str | int, ...]
MAX_VALUES = 10_000  # of a file, those behind aliases counted wherever they are used


class ConfigErrors(ConfigError):
    """Everything that is wrong with a file, reported together; `errors` holds them one by one."""

    def __init__(self, errors: list[ConfigError]) -> None:
        assert errors
        super().__init__("\n".join(str(error) for error in errors))
        self.errors = errors
        self.file, self.line, self.field = errors[0].file, errors[0].line, errors[0].field


@dataclass
class YamlSource:
    """A parsed file. `lines` maps the path of a key or list entry, such as ("models", 0, "name"), to its line."""

    file: str
    data: Any = None
    lines: dict[YamlPath, int] = field(default_factory=dict)
    errors: list[ConfigError] = field(default_factory=list)  # duplicate keys

    def error(self, path: YamlPath, message: str) -> ConfigError:
        """A ConfigError at `path`, or at the nearest enclosing value that the file has."""
        known = next(path[:n] for n in range(len(path), -1, -1) if path[:n] in self.lines or n == 0)
        return ConfigError(message, file=self.file, line=self.lines.get(known, 1), field=dotted(path))


def dotted(path: YamlPath) -> str:
    """("models", 0, "name") as "models[0].name"."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def error_at(text: str, file: str, path: YamlPath, message: str) -> ConfigError:
    """An error of a text that was parsed before, with its line."""
    return parse_yaml(text, file).error(path, message)


@contextmanager
def lines_of(text: str, file: str) -> Iterator[None]:
    """A ConfigError that names a field of this file, found out later, gets its file and line."""
    try:
        yield
    except ConfigError as error:
        if error.line or not error.field.startswith("models["):
            raise
        path = tuple(int(part) if part.isdecimal() else part for part in re.findall(r"\w+", error.field))
        raise error_at(text, file, path, error.message) from None


class _Loader(yaml.SafeLoader):
    """Its errors have the line of the value, whichever they are."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # PyYAML lets through what int(), date() and their like raise, such as for 2024-99-99.
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!s:.60}: {error}", node.start_mark
            ) from None


def parse_yaml(text: str, file: str) -> YamlSource:
    """Parse one document. ConfigError where it is not YAML."""
    source = YamlSource(file)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                source.lines[()] = node.start_mark.line + 1
                for path, line, repeated in _walk(node, ()):
                    if repeated:
                        source.errors.append(
                            ConfigError(
                                f"is given twice, first on line {source.lines[path]}; expected once",
                                file=file,
                                line=line,
                                field=dotted(path),
                            )
                        )
                    else:
                        source.lines[path] = line
                    if len(source.lines) > MAX_VALUES:
                        raise ConfigError(
                            f"expected at most {MAX_VALUES} values; aliases of aliases multiply them",
                            file=file,
                            line=line,
                        )
                source.data = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        line = mark.line + 1 if mark is not None else 0
        raise ConfigError(f"expected YAML: {problem}", file=file, line=line) from None
    except RecursionError:
        raise ConfigError(
            "expected values within values a few levels deep, and none within itself",
            file=file,
            line=next(reversed(source.lines.values()), loader.line + 1),
        ) from None
    return source


def _walk(node: yaml.Node, path: YamlPath) -> Iterator[tuple[YamlPath, int, bool]]:
    """(path, line, seen before) of everything below `node`, parents first."""
    if isinstance(node, yaml.MappingNode):
        seen: set[Hashable] = set()
        for key, value in node.value:
            name = str(key.value)
            yield (*path, name), key.start_mark.line + 1, name in seen
            if name not in seen:
                yield from _walk(value, (*path, name))
            seen.add(name)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*path, index), value.start_mark.line + 1, False
            yield from _walk(value, (*path, index))


def from_validation(
    source: YamlSource, error: ValidationError, keys: Mapping[YamlPath, list[str]]
) -> list[ConfigError]:
    """pydantic's errors as ours. `keys` holds the known keys of each section by its path without indices."""
    return [_one(source, dict(detail), keys) for detail in error.errors(include_url=False)]


def _one(source: YamlSource, detail: dict[str, Any], keys: Mapping[YamlPath, list[str]]) -> ConfigError:
    # Branches of a union add their own names to the location; the file does not know those.
    path: YamlPath = tuple(detail["loc"])
    missing = detail["type"] == "missing"
    cut = len(path) - 1 if missing else len(path)
    while cut and path[:cut] not in source.lines:
        cut -= 1
    path = path[: cut + 1] if missing else path[:cut]
    if missing:
        return source.error(path, "is missing; expected a value")
    if detail["type"] == "extra_forbidden":
        section = tuple(part for part in path[:-1] if isinstance(part, str))
        known = ", ".join(keys.get(section, []))
        return source.error(path, f"unknown key; expected {'one of ' + known if known else 'none here'}")
    message = str(detail["msg"])
    if detail["type"] in ("value_error", "assertion_error"):
        return source.error(path, message.split(", ", 1)[1])
    message = re.sub(r"^(Input should be|\w+ should have)", "expected", message)
    message = re.sub(r" after validation, not \d+$", "", message)
    return source.error(path, f"{message}, got {detail['input']!r:.60}")


def known_keys(kind: type[BaseModel], path: tuple[str, ...] = ()) -> dict[tuple[str | int, ...], list[str]]:
    """The known keys of every section, by its path without list indices."""
    own_first = sorted(kind.model_fields, key=lambda name: name not in kind.__annotations__)
    known: dict[tuple[str | int, ...], list[str]] = {path: own_first}
    for name, info in kind.model_fields.items():
        for inner in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                known |= known_keys(inner, (*path, name))
    return known
