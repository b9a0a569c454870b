"""A token whose embedding is NaN: streams that have it end with an error that says so, and all others are as they were,
also in the blocks of KV memory that it leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flm.worker import Engine, SamplingParams
from flm.worker.errors import NotFinite

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
BROKEN = 88  # the token
BEFORE = [11, 23, 5, 31, 2, 17]
PARAMS = SamplingParams(
    max_tokens=8, temperature=1.0, seed=4, ignore_eos=True, logprobs=1, frequency_penalty=0.5
)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def broken_copy(name: str, target: Path) -> Path:
    shutil.copytree(GOLDEN / name, target)
    assert not json.loads((target / "config.json").read_text()).get("tie_word_embeddings")
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        embedding = next((key for key in tensors if "embed" in key), None)
        if embedding:
            tensors[embedding] = np.array(tensors[embedding])
            tensors[embedding][BROKEN] = np.nan
            save_file(tensors, file)
    return target


@pytest.mark.parametrize(
    ("name", "ranks", "overlap"),
    [
        ("llama31", 1, True),
        ("llama31", 2, False),
        ("deepseek_v2_lite", 1, False),
        ("qwen3_moe", 1, False),
        ("rwkv4", 1, True),
    ],
)
def test_a_stream_that_is_not_finite_ends_by_itself(
    tmp_path: Path, name: str, ranks: int, overlap: bool
) -> None:
    path = broken_copy(name, tmp_path / name)
    with Engine(
        path,
        tensor_parallel=ranks,
        max_sequences=3,
        max_step_tokens=4,
        max_context=32,
        threads=2,
        overlap=overlap,
    ) as engine:

        def generate(prompt: list[int], params: SamplingParams, salt: str) -> list[tuple[int, ...]]:
            return [
                event.token_ids for event in engine.events(engine.submit(prompt, params, cache_salt=salt))
            ]

        alone = [generate(BEFORE, params, "alone") for params in (PARAMS, GREEDY)]
        for turn in range(4):
            ids = [
                engine.submit(prompt, params, cache_salt=str(turn))
                for prompt, params in (
                    (BEFORE, PARAMS),
                    ([*BEFORE, BROKEN, 3, 4, 5, 6, 8], PARAMS),
                    ([BROKEN], GREEDY),
                    (BEFORE, GREEDY),
                )
            ]
            assert [event.token_ids for event in engine.events(ids[0])] == alone[0]
            for request_id, length in ((ids[1], 12), (ids[2], 1)):
                with pytest.raises(
                    NotFinite, match=f"not finite after {length} tokens, {length} of them the prompt's"
                ):
                    list(engine.events(request_id))
            assert [event.token_ids for event in engine.events(ids[3])] == alone[1]
        engine.replica.check()
        assert engine.replica.state == "ready"
