"""What `up` refuses: it says what is wrong and where, starts nothing and leaves nothing."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from gguf import GGUFReader
from gguf_writer import gguf_from_directory
from safetensors.numpy import load_file, save_file

from flm.cluster.cli import main
from flm.cluster.launch import launch
from flm.cluster.launch.checks import why_taken
from flm.cluster.launch.ray_head import free_port
from flm.kernels.cores import usable_cpus

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "llama31"
TEXT = """\
name: unit
gateway: {{listen: 127.0.0.1:{gateway}}}
admin: {{listen: 127.0.0.1:{admin}}}
models:
  - name: m
    path: {path}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where everything goes; whatever a test does, nothing is left there, in memory or in the process table."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(psutil.Process().children(recursive=True))
    monkeypatch.setattr(launch, "_shared_memory", lambda: str(tmp_path))
    yield tmp_path
    assert set(psutil.Process().children(recursive=True)) == before
    assert not list(tmp_path.glob("flm-ray-*"))
    assert not list((tmp_path / "state").rglob("*.json"))
    assert not list(tmp_path.glob("flm-run-*"))


def refused(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `up` says on its error output, and nothing else there."""
    monkeypatch.setattr("sys.argv", ["flm-cluster", "up", str(file), "--detach"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    return said


def cluster_file(folder: Path, more: str = "", path: str = "/nowhere", gateway: int = 0) -> tuple[Path, int]:
    """The file, and the gateway's port."""
    port = gateway or free_port()
    text = TEXT.format(gateway=port, admin=free_port(), path=path)
    (folder / "c.yaml").write_text(text + more)
    return folder / "c.yaml", port


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("    max_contxt: 1\n", "c.yaml:7: models[0].max_contxt: unknown key; expected one of"),
        ("    max_context: many\n", "c.yaml:7: models[0].max_context: "),
        ("    replicas: [1]\n", "c.yaml:7: models[0].replicas: "),
        (
            f"    tensor_parallel: {usable_cpus() + 1}\n",
            f"c.yaml:7: models[0].tensor_parallel: {usable_cpus() + 1} ranks are larger than the machine",
        ),
        ("", "c.yaml:6: models[0].path: /nowhere: no such file or directory; expected a model directory"),
    ],
)
def test_wrong_files(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: str,
    said: str,
) -> None:
    file, port = cluster_file(folder, more)
    assert said in refused(file, monkeypatch, capsys)
    assert why_taken(f"127.0.0.1:{port}") == ""


def test_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(folder / "absent.yaml", monkeypatch, capsys)
    assert f"{folder}/absent.yaml: " in said
    assert "No such file" in said


def test_a_taken_port_stays_its_owners(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        port = owner.getsockname()[1]
        file, _ = cluster_file(folder, gateway=port)
        said = refused(file, monkeypatch, capsys)
        assert f"c.yaml:2: gateway.listen: cannot listen on 127.0.0.1:{port}: the port is taken" in said
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            assert owner.accept()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without(name: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors, file)

    return change


def flip_header(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[8] = ord("[")
    file.write_bytes(raw)


def saying(**fields: object) -> Callable[[Path], None]:
    """config.json with other fields."""

    def change(file: Path) -> None:
        config = file.parent / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))

    return change


DIRECTORIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        cut,
        "truncated: 385776 bytes expected, where tensor 'model.norm.weight' ends, found 192888",
    ),
    "empty": (lambda file: file.write_bytes(b""), "the file is empty"),
    "corrupt": (flip_header, "the header is not JSON"),
    "no file": (Path.unlink, "holds config.json but no weights (*.safetensors)"),
    "pickles": (
        lambda file: file.rename(file.parent / "pytorch_model.bin"),
        "holds weights as pickles (pytorch_model.bin), which are programs and are never loaded; `flm-cluster convert",
    ),
    "no tokenizer": (lambda file: None, "expected tokenizer.json, tokenizer.model"),
    "another architecture": (
        saying(architectures=["LlamaNextForCausalLM"], auto_map={"AutoModel": "m.Llama"}),
        "the nearest supported one is LlamaForCausalLM; the code that comes with the checkpoint (auto_map) is never run",
    ),
    "unknown packing": (
        saying(quantization_config={"quant_method": "mxfp4"}),
        "quantization method 'mxfp4' is not supported; supported: gptq",
    ),
    "missing tensor": (without("model.norm.weight"), "'model.norm.weight' [64] is missing"),
    "missing layer": (
        without("model.layers.1.mlp.up_proj.weight"),
        "'model.layers.1.mlp.up_proj.weight' [",
    ),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_broken_directories(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    change, message = DIRECTORIES[case]
    model = shutil.copytree(GOLDEN, folder / "model")
    change(model / "model.safetensors")
    file, port = cluster_file(folder, path=str(model))
    said = refused(file, monkeypatch, capsys)
    assert str(model) in said
    assert message in said
    assert why_taken(f"127.0.0.1:{port}") == ""


def renamed(file: Path) -> None:
    """One tensor under a name of the same length that nobody asks for."""
    file.write_bytes(file.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))


def endless(file: Path) -> None:
    """A first key whose length no file can hold."""
    raw = bytearray(file.read_bytes())
    raw[24:32] = struct.pack("<Q", 2**64 - 1)
    file.write_bytes(raw)


def overlapping(file: Path) -> None:
    """The second tensor's place moved into the first one."""
    tensors = sorted(GGUFReader(file).tensors, key=lambda tensor: int(tensor.data_offset))
    place = int(tensors[1].field.offset) + sum(part.nbytes for part in tensors[1].field.parts[:-1])
    raw = bytearray(file.read_bytes())
    raw[place : place + 8] = struct.pack("<Q", 32)
    file.write_bytes(raw)


GGUF: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut, "truncated"),
    "truncated header": (lambda file: file.write_bytes(file.read_bytes()[:100]), "truncated"),
    "another file": (lambda file: file.write_bytes(b"nonsense" * 100), "not a GGUF file"),
    "endless key": (endless, "truncated or corrupt"),
    "overlap": (overlapping, "overlaps"),
    "missing tensor": (renamed, "blk.1.ffn_up.weight"),
}


@pytest.mark.parametrize("case", GGUF)
def test_broken_gguf(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    change, message = GGUF[case]
    model = gguf_from_directory(GOLDEN, folder / "m.gguf")
    change(model)
    file, port = cluster_file(folder, path=str(model))
    said = refused(file, monkeypatch, capsys)
    assert f"{model}: " in said
    assert message in said
    assert why_taken(f"127.0.0.1:{port}") == ""
