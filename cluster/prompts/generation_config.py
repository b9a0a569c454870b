"""How a checkpoint's generation_config.json wants its model sampled, where a request does not say.

Its fields are transformers' (huggingface.co/docs/transformers, GenerationConfig); those below count, as in vLLM. A top_k
of -1 switches it off there, 0 here.
"""

from __future__ import annotations

from pathlib import Path

from flm.worker.errors import InvalidRequest
from flm.worker.files.json_fields import Fields, read_json
from flm.worker.request import SamplingParams

FILE = "generation_config.json"
_WAY_OUT = "`generation_config: none` in cluster.yaml leaves this file aside"
FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_sampling(path: Path) -> dict[str, float]:
    """SamplingParams' fields that the model at `path` has defaults for: none of a .gguf file, which has no such file.
    CheckpointError where a value is out of range."""
    file = path / FILE
    if not path.is_dir() or not file.is_file():
        return {}
    fields = read_json(file)
    found = {name: _number(fields, name) for name in FIELDS if fields.get(name) is not None}
    if found.get("top_k") == -1:
        found["top_k"] = 0
    try:
        SamplingParams(**found)  # type: ignore[arg-type]
    except InvalidRequest as error:
        raise fields.fail(f"{error.field}: {error.message}; {_WAY_OUT}") from None
    return found


def _number(fields: Fields, name: str) -> float:
    """A whole one for top_k."""
    value = fields.get(name)
    wanted = (int,) if name == "top_k" else (int, float)
    if type(value) not in wanted:
        kind = "a whole number" if name == "top_k" else "a number"
        raise fields.fail(f"{name}: {kind} expected, found {value!r:.60}; {_WAY_OUT}")
    number: float = value
    return number
