"""Where chat templates run: a Jinja environment that bounds the time, the text and the memory of one rendering.

Only filters and methods that templates of the field use are there; those that make more out of what they are given
are checked before they make it. Everything that is made counts towards one rendering's budget, kept or not.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Undefined, nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flm.cluster.prompts.template_tags import Generation

MAX_CHARACTERS = 4 << 20  # of one value
MAX_MADE = 64 << 20  # characters and list entries of all values of one rendering together
MAX_SECONDS = 1.0
MAX_RANGE = 100_000
_MAX_DEPTH = 64  # of lists in lists
_MAX_PATTERN = 100  # characters of a date's pattern

_FILTERS = frozenset({
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int",
    "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round",
    "safe", "select", "selectattr", "sort", "string", "title", "trim", "unique", "upper", "urlencode",
})  # fmt: skip
_CASES = "upper lower title capitalize casefold swapcase"
_TESTS = "isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle isupper startswith endswith"
_PARTS = "strip lstrip rstrip split rsplit splitlines partition rpartition removeprefix removesuffix"
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(f"{_CASES} {_TESTS} {_PARTS} join replace find rfind index rindex count".split()),
    list: frozenset({"index", "count"}),
    tuple: frozenset({"index", "count"}),
    dict: frozenset({"get", "items", "keys", "values"}),
    int: frozenset(),
    float: frozenset(),
}


class Exceeded(Exception):
    """A template made too much or took too long."""


class Refused(Exception):
    """A template called raise_exception()."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Call begin() before each rendering. Not for use from several threads at once."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", Generation],
            finalize=self._shown,
        )
        self._deadline, self._made = float("inf"), 0
        self.filters = {name: self._checked(self.filters[name]) for name in _FILTERS} | {
            "format": lambda text, *args, **kwargs: self._format(text, kwargs or args),
            "indent": self._indent,
            "join": self._join,
            "replace": self._replace,
            "tojson": self._tojson,
            _EACH: self._each,
            _CONCATENATED: self.concat,
        }
        plain = {name: self.globals[name] for name in ("dict", "cycler", "joiner", "namespace")}
        self.globals = plain | {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "range": self._range,
        }

    def begin(self) -> None:
        self._deadline, self._made = time.monotonic() + MAX_SECONDS, 0

    def tick(self) -> None:
        if time.monotonic() > self._deadline:
            raise Exceeded(f"it took more than {MAX_SECONDS:g} s")

    # ------------------------------------------------------------------------- where Jinja asks the environment

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Loops and `~` go through filters of ours; Jinja compiles them to plain Python otherwise."""
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, _EACH, [], [], None, None, lineno=loop.lineno)
        for concat in list(tree.find_all(nodes.Concat)):
            parts = nodes.List(concat.nodes, lineno=concat.lineno)
            concat.nodes = [nodes.Filter(parts, _CONCATENATED, [], [], None, None, lineno=concat.lineno)]
        return tree.set_environment(self)  # type: ignore[return-value]

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        known = next((names for kind, names in _METHODS.items() if isinstance(obj, kind)), None)
        return (known is None or attr in known) and super().is_safe_attribute(obj, attr, value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.tick()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.tick()
        text, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(text, str) and name == "join":
            (values,) = args
            return self._join(values, text)
        if isinstance(text, str) and name == "replace":
            # Jinja adds arguments of its own within loops
            given = {key: value for key, value in kwargs.items() if not key.startswith("_")}
            return self._replace(text, *args, **given)
        return self._keep(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "%" and isinstance(left, str):
            return self._format(left, right)
        if operator == "**" or (operator == "*" and not _small_product(left, right)):
            raise Exceeded(f"{type(left).__name__} {operator} {type(right).__name__} may become too large")
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self._allow(len(left) + len(right))
        return self._keep(super().call_binop(context, operator, left, right))

    def concat(self, parts: Iterable[Any]) -> str:
        """The texts of all, one behind the other; also of the output of blocks and macros."""
        parts = list(parts)
        self._allow(_weight(parts))
        return str(self._keep("".join(map(str, parts))))

    def _shown(self, value: Any) -> Any:
        """What {{ }} puts out."""
        self._allow(_weight(value))
        return value

    # ------------------------------------------------------------------------------------------------ the budget

    def _allow(self, size: int) -> None:
        """Before something is made: `size` is the most it can be."""
        if size > MAX_CHARACTERS:
            raise Exceeded(f"a value may become longer than {MAX_CHARACTERS} characters")
        if self._made + size > MAX_MADE:
            raise Exceeded(f"it made more than {MAX_MADE} characters")

    def _keep(self, value: Any) -> Any:
        """After something was made."""
        if isinstance(value, str | list | tuple | dict):
            self._allow(len(value))
            self._made += len(value)
        return value

    def _checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # also takes over what Jinja is to pass besides the value
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            for value in (*args, *kwargs.values()):
                self._allow(_weight(value))
            return self._keep(function(*args, **kwargs))

        return bounded

    # --------------------------------------------------------------------------------------- filters and functions

    @staticmethod
    @pass_context
    def _each(context: Any, values: Any) -> Iterator[Any]:
        for value in values:
            context.environment.tick()
            yield value

    def _range(self, *bounds: int) -> Iterator[int]:
        values = range(*bounds)
        if len(values) > MAX_RANGE:
            raise Exceeded(f"a range may become longer than {MAX_RANGE}")
        return iter(values)

    def _format(self, text: Any, values: Any) -> str:
        text = str(text)
        if re.search(r"\*|\d{3}", text):
            raise Exceeded("widths of formats may become too large")
        self._allow(len(text) + text.count("%") * (100 + _weight(values)))
        return str(self._keep(text % values))

    def _indent(self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = str(text)
        margin = width if isinstance(width, str) else " " * min(width, MAX_CHARACTERS)
        lines = text.splitlines() or [""]
        self._allow(len(text) + len(lines) * len(margin))
        rest = [margin + line if line or blank else line for line in lines[1:]]
        return str(self._keep("\n".join([margin + lines[0] if first else lines[0], *rest])))

    def _join(self, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        values = list(values)
        if attribute is not None:
            values = [self.getitem(value, attribute) for value in values]
        self._allow(_weight(values) + len(d) * len(values))
        return str(self._keep(d.join(map(str, values))))

    def _replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        text = str(text)
        found = text.count(old) if count is None or count < 0 else min(count, text.count(old))
        self._allow(len(text) + found * len(new))
        return str(self._keep(text.replace(old, new, -1 if count is None else count)))

    def _tojson(self, value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        """Plain JSON; Jinja's own escapes HTML."""
        if indent is not None and not 0 <= indent <= _MAX_PATTERN:
            raise Exceeded(f"an indent of {indent!r:.20} may become too large")
        pieces, size = [], 0
        for piece in json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent).iterencode(value):
            size += len(piece)
            self._allow(size)
            self.tick()
            pieces.append(piece)
        return str(self._keep("".join(pieces)))


_EACH, _CONCATENATED = "flm each", "flm concatenated"  # no template can spell these


def _weight(value: Any, depth: int = 0, limit: int = MAX_CHARACTERS) -> int:
    """About the characters of str(value), at most; counting ends beyond `limit`. What makes its values as they are
    asked for weighs nothing yet."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Undefined) or not isinstance(value, list | tuple | dict):
        return 32
    if depth > _MAX_DEPTH:
        raise Exceeded(f"a value may become more than {_MAX_DEPTH} levels deep")
    total = 2
    for part in (x for pair in value.items() for x in pair) if isinstance(value, dict) else value:
        total += 4 + _weight(part, depth + 1, limit - total)
        if total > limit:
            break
    return total


def _small_product(left: Any, right: Any) -> bool:
    sizes = [value if isinstance(value, int | float) else len(value) for value in (left, right)]
    return abs(sizes[0] * sizes[1]) <= MAX_CHARACTERS


def _strftime_now(pattern: str) -> str:
    if len(pattern) > _MAX_PATTERN or re.search(r"\d{3}", pattern):
        raise Exceeded("the pattern of a date may become too large")
    return datetime.now().strftime(pattern)


def _raise_exception(message: str) -> NoReturn:
    raise Refused(message)
