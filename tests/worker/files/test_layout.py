"""Where a file's tensors may lie."""

import pytest

from flm.worker.files.layout import layout_fault


@pytest.mark.parametrize(
    ("places", "size", "fault"),
    [
        ([], 3, None),  # a GGUF of fields alone is not padded up to where tensors would begin
        ([("b", 12, 4), ("a", 8, 4)], 16, None),
        ([("nothing", 0, 0), ("a", 8, 4)], 12, None),
        ([("a", 4, 4)], 16, "tensor 'a' at byte 4 overlaps the header, which ends at 8"),
        ([("a", 8, 4), ("b", 11, 4)], 16, "tensor 'b' at byte 11 overlaps tensor 'a', which ends at 12"),
        ([("a", 8, 4), ("b", 12, 4)], 15, "truncated: 16 bytes expected, where tensor 'b' ends, found 15"),
    ],
)
def test_layout_fault(places: list[tuple[str, int, int]], size: int, fault: str | None) -> None:
    assert layout_fault(places, 8, size) == fault
