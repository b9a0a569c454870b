"""Text of token streams: whole characters, stops across token borders, counts of tokens used."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flm.cluster.gateway.stops import StopMatcher
from flm.cluster.gateway.text import TextStream
from flm.worker.vocabularies.tokenizer import IncrementalDecoder, Tokenizer

TEXT = "Grüße 😀 世界"


def stream(tokenizer: Tokenizer, *stops: str) -> TextStream:
    return TextStream(IncrementalDecoder(tokenizer), StopMatcher(stops) if stops else None)


def test_never_half_a_character(tokenizer: Tokenizer) -> None:
    text = stream(tokenizer)
    pieces = [text.push([token])[0] for token in TEXT.encode()]
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces)
    assert text.finish() == ""


def test_a_character_that_is_never_completed(tokenizer: Tokenizer) -> None:
    text = stream(tokenizer)
    assert text.push("é".encode()[:1]) == ("", 1)
    assert text.finish() == "\ufffd"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 5), min_size=20, max_size=20))
def test_stop_across_tokens_takes_the_same_tokens_for_any_frames(
    tokenizer: Tokenizer, sizes: list[int]
) -> None:
    text, tokens, out, used = stream(tokenizer, "😀 世"), list(TEXT.encode()), "", 0
    for size in sizes:
        piece, count = text.push(tokens[:size])
        out, used, tokens = out + piece, used + count, tokens[size:]
        if text.matched is not None:
            break
    assert (out, text.matched) == ("Grüße ", "😀 世")
    assert used == len("Grüße 😀 世".encode())


def test_held_text_is_given_out_at_the_end(tokenizer: Tokenizer) -> None:
    text = stream(tokenizer, "end!")
    assert text.push(b"the end")[0] == "the "
    assert text.finish() == "end"


def test_stop_that_the_flush_completes(tokenizer: Tokenizer) -> None:
    text = stream(tokenizer, "x\ufffd")
    assert text.push([*b"ax", 0xC3])[0] == "a"
    assert (text.finish(), text.matched) == ("", "x\ufffd")
