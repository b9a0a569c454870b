"""RWKV-4's last norm has an eps of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from flm.worker import Engine

DATA = Path(__file__).parent.parent.parent / "data"


def test_an_eps_that_only_the_last_norm_goes_without(tmp_path: Path) -> None:
    """Logits of the golden checkpoint with another layer_norm_epsilon, by transformers' RwkvForCausalLM."""
    golden = DATA / "golden" / "rwkv4"
    shutil.copy(golden / "model.safetensors", tmp_path)
    config = json.loads((golden / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-2}))
    ids = np.load(golden / "ref.npz")["ids"].tolist()
    want = np.array(json.loads((DATA / "rwkv4_wide_eps.json").read_text())["logits"])
    with Engine(tmp_path, max_sequences=1, max_step_tokens=64) as engine:
        got = engine.logits(ids)[-1]
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
