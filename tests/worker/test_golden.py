"""Golden checkpoints: tiny models of every family with the logits that their own code computes for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flm.worker import Engine

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir())
TOLERANCE = 2e-4  # of the largest logit


def tiny(name: str, **options: object) -> Engine:
    return Engine(GOLDEN / name, max_sequences=8, max_step_tokens=64, **options)  # type: ignore[arg-type]


def reference(name: str) -> tuple[list[int], np.ndarray]:
    ref = np.load(GOLDEN / name / "ref.npz")
    return ref["ids"].tolist(), ref["logits"]


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("name", NAMES)
def test_logits_on_any_number_of_ranks_and_however_the_prompt_is_cut(name: str) -> None:
    ids, want = reference(name)
    for ranks in (1, 2, 3):
        with tiny(name, tensor_parallel=ranks) as engine:
            whole = engine.logits(ids)
            assert relative(whole, want) < TOLERANCE, f"{ranks} ranks"
            for chunk in (1, 5):
                np.testing.assert_array_equal(engine.logits(ids, chunk=chunk), whole)
