"""Sizes as people write them."""

import pytest

from flm.cluster.settings.units import format_count, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [("1GiB", 2**30), ("512 MB", 512_000_000), ("1.5k b", None), ("1.5kb", 1500), (7, 7), ("7", 7)],
)
def test_sizes(text: object, count: int | None) -> None:
    if count is None:
        with pytest.raises(ValueError, match="expected a size such as 1GiB"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == count


@pytest.mark.parametrize("size", ["9" * 400 + "GiB", "9" * 20, "9" * 5000, 2**63, 10**4000, -1, True, None])
def test_what_is_no_size(size: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_bytes(size)


def test_counts() -> None:
    counts = [7, 1500, 134_515_008, 72_290_000_000, 1.2e12]
    assert [format_count(count) for count in counts] == ["7", "1.5 k", "134.5 M", "72.29 B", "1.2 T"]
