"""YAML that is none, and values that no document can hold: each refused with its file and line."""

import pytest

from flm.cluster.settings.yaml_source import lines_of, parse_yaml
from flm.worker.errors import ConfigError

LAUGHS = "a0: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
MERGED = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("a: 1\nb: 2024-99-99\n", 2, "2024-99-99: month must be in 1..12"),
        ("a: 1\nb: " + "9" * 5000, 2, "9999"),
        ("a: 1\nb: !!int x\n", 2, "invalid literal"),
        ("a: 1\nb: !!timestamp x\n", 2, "x: "),
        ("a: 1\nb: &x [*x]\n", 2, "none within itself"),
        ("a: 1\nb: &x {c: *x}\n", 2, "none within itself"),
        ("a: 1\nb: " + "[" * 3000, 2, "a few levels deep"),
        ("a: 1\n? [1, 2]\n: 3\n", 2, "unhashable key"),
        (LAUGHS, 1, "expected at most 10000 values; aliases of aliases multiply them"),
        (MERGED, 1, "expected at most 10000 values"),
    ],
)
def test_refusals_have_their_place(text: str, line: int, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "c.yaml")
    assert (caught.value.file, caught.value.line) == ("c.yaml", line)
    assert why in str(caught.value)


def test_lines_of_values() -> None:
    source = parse_yaml("a: 1\nb:\n- c: 2024-01-31\n", "c.yaml")
    assert source.lines == {(): 1, ("a",): 1, ("b",): 2, ("b", 0): 3, ("b", 0, "c"): 3}
    assert str(source.data["b"][0]["c"]) == "2024-01-31"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("models[0].max_context", "c.yaml:3: models[0].max_context: too long"),
        ("models[0].other", "c.yaml:2: models[0].other: too long"),
        ("api_key", "api_key: too long"),
    ],
)
def test_what_is_found_out_later_gets_its_place(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught, lines_of("models:\n- name: m\n  max_context: 9\n", "c.yaml"):
        raise ConfigError("too long", field=name)
    assert str(caught.value) == said
