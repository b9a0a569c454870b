"""Stop strings do not depend on how the text was cut."""

from hypothesis import given
from hypothesis import strategies as st

from flm.cluster.gateway.stops import StopMatcher

TEXT = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4, unique=True)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the first prefix that ends with a stop, the longest such stop."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@given(TEXT, STOPS, st.lists(st.integers(1, 7), min_size=30, max_size=30))
def test_same_result_for_any_cut(text: str, stops: list[str], sizes: list[int]) -> None:
    matcher = StopMatcher(stops)
    out, rest = "", text
    for size in sizes:
        out += matcher.push(rest[:size])
        rest = rest[size:]
        if matcher.matched is not None:
            break
    if matcher.matched is None:
        out += matcher.flush()
    assert (out, matcher.matched) == naive(text, stops)


@given(TEXT, STOPS)
def test_holds_back_only_what_could_begin_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    out = matcher.push(text)
    if matcher.matched is None:
        held = text[len(out) :]
        assert not held or any(stop.startswith(held) for stop in stops)
        assert not any(stop.startswith(text[i:]) for i in range(len(out)) for stop in stops)


def test_held_text_comes_when_it_turns_out_to_be_no_stop() -> None:
    matcher = StopMatcher(["</end>"])
    assert [matcher.push(p) for p in ["a </e", "n", "x b"]] == ["a ", "", "</enx b"]
