"""Conversions: the same logits as quantising at load, in every form; whole or not at all; pickles only through them."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_model import CONFIG, METHODS, drawing, write_model
from safetensors.numpy import load_file
from torch_writer import write_torch_directory

from flm.kernels.quant import QuantizedMatrix, quantize
from flm.worker import Engine
from flm.worker.checkpoints.checkpoint import open_checkpoint
from flm.worker.checkpoints.weights import shard_spec
from flm.worker.conversion import calibration
from flm.worker.conversion.convert import convert
from flm.worker.errors import CheckpointError, ConfigError

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
IDS = np.random.default_rng(0).integers(0, 96, 30).tolist()


def logits(path: Path, ranks: int = 1, quantization: str = "auto") -> Any:
    options = {"max_sequences": 4, "max_step_tokens": 64}
    with Engine(path, tensor_parallel=ranks, quantization=quantization, **options) as engine:
        return engine.logits(IDS)


def converted(source: Path, target: Path, quantization: str = "auto", ranks: int = 0) -> list[float]:
    seen: list[float] = []
    convert(source, target, quantization, ranks, seen.append)
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0)
    assert [path.name for path in target.parent.iterdir() if path.name.startswith(".")] == []
    return seen


@pytest.mark.parametrize("quantization", ["auto", "int8", "int4:group=32", "bf16"])
def test_one_form_for_any_number_of_ranks(tmp_path: Path, quantization: str) -> None:
    converted(GOLDEN / "llama31", tmp_path / "m", quantization)
    for ranks in (1, 3):
        want = logits(GOLDEN / "llama31", ranks, quantization)
        np.testing.assert_array_equal(logits(tmp_path / "m", ranks), want)
    storage = open_checkpoint(tmp_path / "m").storage("model.layers.0.mlp.up_proj.weight")
    assert storage.format == {"auto": "float32", "bf16": "bfloat16"}.get(quantization, quantization[:4])


@pytest.mark.parametrize("quantization", ["auto", "int4"])
@pytest.mark.parametrize("name", ["llama2", "internlm1_as_llama"])
def test_one_file_for_each_rank(tmp_path: Path, name: str, quantization: str) -> None:
    converted(GOLDEN / name, tmp_path / "m", quantization, ranks=3)
    np.testing.assert_array_equal(logits(tmp_path / "m", 3), logits(GOLDEN / name, 3, quantization))
    checkpoint = open_checkpoint(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"tensor_parallel: .* was converted for tensor_parallel: 3"):
        shard_spec(checkpoint, 2, 0, "auto")
    with pytest.raises(ConfigError, match=r"quantization: .* is converted already; auto expected"):
        shard_spec(checkpoint, 3, 0, "int8")
    (tmp_path / "m" / "rank-00001-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00001-of-00003\.safetensors: cannot be read"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("method", ["gptq", "fp8"])
@pytest.mark.parametrize("ranks", [0, 2])
def test_packed_checkpoints_are_unpacked_once_and_for_all(tmp_path: Path, method: str, ranks: int) -> None:
    packed, _ = write_model(tmp_path / "source", drawing(method), {"quantization_config": METHODS[method]})
    converted(packed, tmp_path / "m", ranks=ranks)
    np.testing.assert_array_equal(logits(tmp_path / "m", ranks or 1), logits(packed, ranks or 1))
    assert METHODS[method]["quant_method"] not in (tmp_path / "m" / "config.json").read_text()


@pytest.mark.parametrize("files", [1, 2])
def test_pickles_are_read_by_conversions_alone(tmp_path: Path, files: int) -> None:
    _, floats = write_model(tmp_path / "source", drawing("awq"), {})
    tensors = load_file(floats / "model.safetensors")
    pickled = write_torch_directory(tmp_path / "pickled", tensors, CONFIG, files)
    with pytest.raises(
        CheckpointError, match=r"pickles \(pytorch_model.*\.bin\), .*`flm-cluster convert .* NEW_DIR"
    ):
        open_checkpoint(pickled)
    converted(pickled, tmp_path / "m", "int8")
    np.testing.assert_array_equal(logits(tmp_path / "m"), logits(floats, quantization="int8"))


@pytest.mark.parametrize(
    ("quantization", "most"), [("int8", 0.03), ("int8:group=64", 0.04), ("int4:group=16", 0.35)]
)
def test_rounding_at_load_moves_logits_little(quantization: str, most: float) -> None:
    want, got = logits(GOLDEN / "llama31"), logits(GOLDEN / "llama31", quantization=quantization)
    assert 0 < np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) < most


def test_weights_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flm.worker.conversion.prepare.FILE_BYTES", 60_000)
    converted(GOLDEN / "llama2", tmp_path / "m", "int4")
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 2
    np.testing.assert_array_equal(logits(tmp_path / "m"), logits(GOLDEN / "llama2", quantization="int4"))


def test_what_goes_with_the_weights(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in (GOLDEN / "llama2").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    for name in ("tokenizer.json", "LICENSE", "modeling_x.py", "quantize_config.json", "old.onnx"):
        (source / name).write_text("{}")
    (source / "quantize_config.json").unlink()
    converted(source, tmp_path / "m", "int8")
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert {
        "tokenizer.json",
        "LICENSE",
        "generation_config.json",
        "config.json",
        "model.safetensors",
    } <= names
    assert not names & {"modeling_x.py", "old.onnx"}
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "flm"


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for source, target, error, message in (
        (GOLDEN / "llama2", "there", ConfigError, "exists already; name a new directory"),
        (tmp_path / "absent", "new", ConfigError, "a directory with config.json and weights expected"),
        (
            tmp_path / "m.gguf",
            "new",
            ConfigError,
            "source: .*a directory expected; a .gguf file is quantised already",
        ),
        (tmp_path / "there", "new", CheckpointError, "config.json: cannot be read|holds no weights"),
    ):
        with pytest.raises(error, match=message):
            convert(source, tmp_path / target, "auto", 0, lambda _: None)
    with pytest.raises(ConfigError, match="ranks are too many"):
        convert(GOLDEN / "llama2", tmp_path / "new", "auto", 9, lambda _: None)
    with pytest.raises(ConfigError, match="got 'int3'"):
        convert(GOLDEN / "llama2", tmp_path / "new", "int3", 0, lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_full_disk_leaves_nothing(tmp_path: Path, ranks: int) -> None:
    """Here the system refuses to let a file grow, as it does where no space is left."""
    limits, handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(
            ConfigError, match=r"new cannot be written: File too large; nothing is left of it"
        ):
            convert(GOLDEN / "llama2", tmp_path / "new", "int8", ranks, lambda _: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"new cannot be written: File exists \(.*file\)"):
        convert(GOLDEN / "llama2", tmp_path / "file" / "new", "int8", ranks, lambda _: None)


KILLED = """
import sys, time
from pathlib import Path
from flm.worker.conversion.convert import convert

def wait(fraction):
    print("writing", flush=True)
    time.sleep(60)

convert(Path(sys.argv[1]), Path(sys.argv[2]), "int8", 0, wait)
"""


def test_a_killed_conversion_leaves_no_target_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "m"
    arguments = [sys.executable, "-c", KILLED, str(GOLDEN / "llama2"), str(target)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        with pytest.raises(ConfigError, match="is being written by another conversion"):
            convert(GOLDEN / "llama2", target, "int8", 0, lambda _: None)
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    (tmp_path / ".m.partial" / "stray").write_text("left")
    time.sleep(0.05)
    converted(GOLDEN / "llama2", target, "int8")
    assert not (target / "stray").exists()
    np.testing.assert_array_equal(logits(target), logits(GOLDEN / "llama2", quantization="int8"))


def inputs_of_the_first_layer(path: Path) -> dict[str, Any]:
    """Moments of what comes into its matrices."""
    found: dict[int, Any] = {}
    with Engine(path, max_sequences=4, capture=False) as engine:
        backend, layer = engine.ranks[0].backend, engine.ranks[0].model.layers[0]
        linear = backend.linear

        def listen(x: Any, weight: Any, *rest: Any) -> None:
            found[id(weight)] = x.T.astype(np.float64) @ x
            linear(x, weight, *rest)

        vars(backend)["linear"] = listen
        engine.logits(IDS)
        parts = {"self_attn.q": layer.attention.qkv, "self_attn.o": layer.attention.output}
        parts |= {"mlp.up": layer.feed_forward.gate_up, "mlp.down": layer.feed_forward.down}
        return {name: found[id(matrix)] for name, matrix in parts.items()}


def test_calibrated_int4_is_nearer_than_rounding_to_the_nearest(tmp_path: Path) -> None:
    source = GOLDEN / "llama31"
    convert(source, tmp_path / "m", "int4:group=64", 0, lambda _: None, calibrate=True)
    made, floats = open_checkpoint(tmp_path / "m"), open_checkpoint(source)
    for part, moments in inputs_of_the_first_layer(source).items():
        name = f"model.layers.0.{part}_proj.weight"
        exact = floats.matrix(name).dequantize()

        def loss(matrix: QuantizedMatrix, exact: Any = exact, moments: Any = moments) -> float:
            error = matrix.dequantize() - exact
            return float((error @ moments * error).sum())

        assert made.storage(name).format == "int4"
        assert 0 < loss(made.matrix(name)) < 0.8 * loss(quantize(exact, "int4", 64)), part
    for quantization, ranks in (("int8", 0), ("int4", 2)):
        with pytest.raises(ConfigError, match="calibrate: int4 for any number of ranks expected"):
            convert(source, tmp_path / "n", quantization, ranks, lambda _: None, calibrate=True)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2"])
def test_experts_and_latent_attention_are_calibrated(tmp_path: Path, name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(calibration, "SEQUENCES", 8)
    monkeypatch.setattr(calibration, "TOKENS", 96)
    source, ids = GOLDEN / name, np.random.default_rng(1).integers(3, 90, (4, 40))
    seen: list[float] = []
    convert(source, tmp_path / "m", "int4:group=64", 0, seen.append, calibrate=True)
    assert seen == sorted(seen) and 0 < seen[0] < 0.3 and seen[-1] == pytest.approx(1.0)
    checkpoint = open_checkpoint(tmp_path / "m")
    rounded = [name for name in checkpoint.shapes if "experts." in name or "_a_proj" in name]
    assert rounded and all(checkpoint.storage(name).format == "int4" for name in rounded)
    exact, made, plain = (
        read_all(path, ids, quantization)
        for path, quantization in ((source, "fp32"), (tmp_path / "m", "auto"), (source, "int4:group=64"))
    )
    assert np.square(made - exact).sum() < 0.9 * np.square(plain - exact).sum()


def read_all(path: Path, ids: Any, quantization: str) -> Any:
    with Engine(path, max_sequences=4, quantization=quantization) as engine:
        return np.concatenate([engine.logits(row.tolist()) for row in ids]).astype(np.float64)
