"""How a checkpoint wants its model sampled, where a request does not say: its generation_config.json, or the metadata
`general.sampling.*` of a .gguf file.

The former's fields are transformers' (huggingface.co/docs/transformers, GenerationConfig); those below count, as in vLLM.
The latter's are of ggml's GGUF constants, and count as in llama.cpp. A top_k of -1 switches it off there, 0 here; llama.cpp
is greedy for temperatures below zero too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flm.worker.errors import InvalidRequest
from flm.worker.files.gguf_file import GGUFFile
from flm.worker.files.json_fields import Fields, read_json
from flm.worker.request import SamplingParams

FILE = "generation_config.json"
_WAY_OUT = "`generation_config: none` in cluster.yaml leaves it aside"
FIELDS = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
GGUF_FIELDS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def read_sampling(path: Path) -> dict[str, float]:
    """SamplingParams' fields that the model at `path` (a directory or a .gguf file) has defaults for. CheckpointError where
    a value is out of range."""
    if path.is_dir():
        file = path / FILE
        return _read(read_json(file), FIELDS) if file.is_file() else {}
    gguf = GGUFFile(path)
    return _read(Fields(path, {key: gguf.get(key) for key in GGUF_FIELDS.values()}), GGUF_FIELDS)


def _read(fields: Fields, names: Mapping[str, str]) -> dict[str, float]:
    """names: SamplingParams' field → the checkpoint's."""
    found = {name: _number(fields, name, key) for name, key in names.items() if fields.get(key) is not None}
    if found.get("top_k") == -1:
        found["top_k"] = 0
    if names is GGUF_FIELDS and found.get("temperature", 0) < 0:
        found["temperature"] = 0.0
    try:
        SamplingParams(**found)  # type: ignore[arg-type]
    except InvalidRequest as error:
        raise fields.fail(f"{names[error.field]}: {error.message}; {_WAY_OUT}") from None
    return found


def _number(fields: Fields, name: str, key: str) -> float:
    """A whole one for top_k."""
    value = fields.get(key)
    wanted = (int,) if name == "top_k" else (int, float)
    if type(value) not in wanted:
        kind = "a whole number" if name == "top_k" else "a number"
        raise fields.fail(f"{key}: {kind} expected, found {value!r:.60}; {_WAY_OUT}")
    number: float = value
    return number
