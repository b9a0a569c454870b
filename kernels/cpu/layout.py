"""Sizes on which compiled code and the Python that calls it agree."""

CHUNK = 48  # tokens that share one converted tile: accumulators, tile and x stay in the first-level cache
TABLE_WIDTH = 16  # int64 words of a matrix in the tables of segments.py
LOCAL = 256  # bytes of a program row, at the start of a worker's area
ADAPTER_WIDTH, ADAPTER_CHUNK, ADAPTER_PANELS = (
    12,
    24,
    4,
)  # words of a factor's entry; tokens and panels of a task


def panel_bytes(group: int) -> int:
    """What a worker needs to compute a panel: accumulators [CHUNK, 64], then a tile [group, 64], all float32."""
    return (CHUNK + group) * 256


def plan_words(tokens: int, slots: int, experts: int) -> int:
    """int64 words of the plan that expert_sort writes."""
    pairs = tokens * slots
    return 2 + experts + 3 * pairs + 3 * (experts + pairs // CHUNK + 1)
