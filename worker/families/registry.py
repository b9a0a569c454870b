"""Which family a checkpoint belongs to."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from flm.worker.config import ModelConfig
from flm.worker.families import gguf, hub
from flm.worker.families.baichuan import BAICHUAN
from flm.worker.families.bloom import BLOOM
from flm.worker.families.chatglm import CHATGLM_6B
from flm.worker.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from flm.worker.families.family import Family
from flm.worker.families.glm import CHATGLM, GLM, GLM4
from flm.worker.families.internlm2 import INTERNLM2
from flm.worker.families.llama import INTERNLM, INTERNLM3, LLAMA, XVERSE, YI
from flm.worker.families.minicpm import GRANITE, MINICPM
from flm.worker.families.moss import MOSS
from flm.worker.families.qwen import QWEN, QWEN2, QWEN3
from flm.worker.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from flm.worker.families.rwkv import RWKV
from flm.worker.families.support import SUPPORT
from flm.worker.files.gguf_file import GGUFFile
from flm.worker.files.json_fields import Fields, read_json

FAMILIES = (
    LLAMA, YI, XVERSE, INTERNLM, INTERNLM2, INTERNLM3, QWEN, QWEN2, QWEN3, BAICHUAN, MINICPM, GRANITE, CHATGLM, CHATGLM_6B, GLM,
    GLM4,    MOSS, BLOOM, DEEPSEEK_V2, DEEPSEEK_V3, QWEN2_MOE, QWEN3_MOE, RWKV,
)  # fmt: skip
_COMMON_END = "ForCausalLM"
# GGUF's names of architectures that are called otherwise here
_GGUF_NAMES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "deepseek2": "deepseek_v2"}


def read_config(directory: Path) -> tuple[ModelConfig, Family]:
    """The decoder that a Hugging Face directory's config.json describes, in transformers' old or new spelling.

    Raises CheckpointError naming the file, the field and what was expected; for an unknown architecture also the
    nearest supported one."""
    fields = read_json(directory / "config.json")
    family = _family(fields)
    return hub.validated(family.read(fields), fields), family


def read_gguf(file: GGUFFile) -> tuple[ModelConfig, Family]:
    """The decoder that a GGUF file's metadata describes. Raises CheckpointError."""
    config = gguf.read_config(file)
    return hub.validated(config, Fields(file.path, {})), gguf.family(config)


def family_of(path: Path, config: ModelConfig) -> Family:
    """How the code that the model was published with names its modules, for a directory or a GGUF file."""
    if path.is_dir():
        return read_config(path)[1]
    name = _GGUF_NAMES.get(config.family, config.family)
    same = (family for family in FAMILIES if family.name == name)
    return next(same, Family(name, (), lambda fields: config))


def _family(fields: Fields) -> Family:
    """By its architecture; where config.json names none, by its model_type."""
    found = hub.architecture(fields)
    for family in FAMILIES:
        meant = found in family.architectures if found else fields.get("model_type") == family.model_type
        if meant and family.accepts(fields):
            return family
    refused = {row.architecture: row.note for row in SUPPORT if row.verified == "refused"}
    if found in refused:
        raise fields.fail(f"architectures: {found!r} is not supported: {refused[found]}")
    said = f"architectures: {found!r}" if found else f"model_type: {fields.get('model_type')!r}"
    supported = list(dict.fromkeys(name for family in FAMILIES for name in family.architectures))
    nearest = _nearest(found, fields.get("model_type"), supported)
    hint = f"; the nearest supported one is {nearest}" if nearest else ""
    if fields.get("auto_map"):
        hint += "; the code that comes with the checkpoint (auto_map) is never run"
    raise fields.fail(f"{said} is not supported{hint}; supported: {', '.join(supported)}")


def _nearest(architecture: str | None, model_type: object, supported: list[str]) -> str:
    """The supported architecture whose name is most like it, else the one of that model_type; "" where none is like it.
    What all names end with makes none alike."""
    stem = lambda name: name.removesuffix(_COMMON_END).lower()
    stems = {stem(name): name for name in reversed(supported)}
    if close := get_close_matches(stem(architecture or str(model_type)), stems, 1):
        return stems[close[0]]
    return next((f.architectures[0] for f in FAMILIES if f.model_type == model_type), "")
