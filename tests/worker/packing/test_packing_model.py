"""Models in quantised safetensors: the logits of the weights that they mean, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import packers
import pytest
from packed_model import METHODS, drawing, write_model
from safetensors_writer import write_safetensors

from flm.worker import Engine
from flm.worker.checkpoints.checkpoint import open_checkpoint
from flm.worker.checkpoints.weights import load_weights, shard_spec
from flm.worker.errors import CheckpointError
from flm.worker.files.safetensors_file import SafetensorsFile

IDS = np.random.default_rng(2).integers(0, 96, 40).tolist()


@pytest.fixture(scope="module", params=["gptq", "awq", "fp8", "compressed"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    target = tmp_path_factory.mktemp("model")
    return write_model(target, drawing(request.param), {"quantization_config": METHODS[request.param]})


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_logits_are_those_of_the_meant_weights(model: tuple[Path, Path], ranks: int) -> None:
    packed, floats = model
    with Engine(floats, max_sequences=4, max_step_tokens=64) as engine:
        want = engine.logits(IDS)
    with Engine(packed, tensor_parallel=ranks, max_sequences=4, max_step_tokens=64) as engine:
        got = engine.logits(IDS)
        np.testing.assert_array_equal(engine.logits(IDS, chunk=7), got)
    assert np.abs(got - want).max() < 2e-4 * np.abs(want).max()
    assert open_checkpoint(packed).storage("model.layers.0.self_attn.q_proj.weight").format in ("int4", "fp8")


def test_projections_that_order_their_input_differently_are_widened_exactly(tmp_path: Path) -> None:
    packed, floats = write_model(tmp_path, drawing("gptq apart"), {"quantization_config": METHODS["gptq"]})
    weights = [
        load_weights(checkpoint, shard_spec(checkpoint, 1, 0, "auto"), "auto", lambda _: None)
        for checkpoint in (open_checkpoint(packed), open_checkpoint(floats))
    ]
    whole = weights[0].shard.q_rows, weights[0].shard.kv_rows
    parts = [("q_proj", whole[0]), ("k_proj", whole[1]), ("v_proj", whole[1])]
    got, want = (w.fused("model.layers.0.self_attn.", parts) for w in weights)
    assert got.format == "float32"
    np.testing.assert_array_equal(got.dequantize(), want.dequantize())


def test_a_missing_part_is_named_when_the_checkpoint_is_opened(tmp_path: Path) -> None:
    def broken(name: str, n: int, k: int) -> packers.Layer:
        tensors, meant = packers.awq(np.random.default_rng(0), n, k, 64)
        if name == "mlp.up_proj":
            del tensors["scales"]
        return tensors, meant

    packed, _ = write_model(tmp_path, broken, {"quantization_config": METHODS["awq"]})
    with pytest.raises(CheckpointError, match=r"tensor 'model.layers.0.mlp.up_proj.scales' is missing"):
        open_checkpoint(packed)


def test_biases_of_zeros_beside_packed_weights_are_none(tmp_path: Path) -> None:
    """Early GPTQ packers gave every layer a bias."""
    value = 0.0

    def biased(name: str, n: int, k: int) -> packers.Layer:
        tensors, meant = packers.gptq(np.random.default_rng(0), n, k, 64)
        return tensors | {"bias": np.full(n, value if name == "self_attn.o_proj" else 0, np.float16)}, meant

    method = METHODS["gptq"] | {"desc_act": False}
    packed, _ = write_model(tmp_path / "zeros", biased, {"quantization_config": method})
    assert not open_checkpoint(packed).config.attention.output_bias
    value = 0.5
    packed, _ = write_model(tmp_path / "others", biased, {"quantization_config": method})
    with pytest.raises(CheckpointError, match=r"does not have: 'model.layers.0.self_attn.o_proj.bias', "):
        open_checkpoint(packed)


def test_scales_of_an_fp8_cache_are_passed_over(tmp_path: Path) -> None:
    packed, _ = write_model(tmp_path, drawing("fp8"), {"quantization_config": METHODS["fp8"]})
    file, prefix = packed / "model.safetensors", "model.layers.1.self_attn."
    tensors = {name: entry.dtype for name, entry in SafetensorsFile(file).tensors.items()}
    values = {name: SafetensorsFile(file).read(name) for name in tensors}
    more = {prefix + name: np.ones(1, np.float32) for name in ("k_scale", "v_scale", "k_proj.output_scale")}
    fp8 = {name: kind for name, kind in tensors.items() if kind == "F8_E4M3"}
    write_safetensors(file, values | more, fp8)
    assert open_checkpoint(packed).storage(prefix + "k_proj.weight").format == "fp8"
    write_safetensors(file, values | {prefix + "q_proj.shift": np.ones(1, np.float32)}, fp8)
    with pytest.raises(CheckpointError, match=r"does not have: 'model.layers.1.self_attn.q_proj.shift'"):
        open_checkpoint(packed)
