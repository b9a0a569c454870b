"""adapter_model.safetensors of a LoRA adapter: which tensors are the factors of which module of a model.

Shape legend: N rows (outputs), K columns (inputs), R rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from flm.worker.adapters.config import CONFIG_NAME, AdapterConfig
from flm.worker.canonical import VOCABULARY, decoder_tensors
from flm.worker.config import ModelConfig
from flm.worker.errors import CheckpointError
from flm.worker.families import registry
from flm.worker.files.safetensors_file import SafetensorsFile
from flm.worker.tensors.recipe import Recipe

WEIGHTS_NAME, PICKLE_NAME = "adapter_model.safetensors", "adapter_model.bin"
# last parts of the canonical names of matrices that adapters may change; of the latter, ranks have some columns each
WHOLE_INPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "q_a_proj", "kv_a_proj")
CUT_INPUTS = ("o_proj", "down_proj")
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Module:
    """A module of the base model as its own code names it, the shape of its weight, and the canonical matrices whose rows
    it holds."""

    name: str
    shape: tuple[int, int]
    rows: dict[str, Recipe]


def modules_of(model: Path, config: ModelConfig) -> dict[str, Module]:
    """Every matrix of the checkpoint at `model`, by the name of its module."""
    recipes = registry.family_of(model, config).recipes(replace(config, tie_embeddings=False))
    specs = decoder_tensors(replace(config, tie_embeddings=False))
    rows: dict[str, dict[str, Recipe]] = {}
    for name, recipe in recipes.items():
        if len(specs[name].shape) == 2:
            rows.setdefault(recipe.tensor.removesuffix(".weight"), {})[name] = recipe
    modules = {}
    for module, parts in rows.items():
        height = max(recipe.last_row(specs[name].shape[0]) for name, recipe in parts.items()) + 1
        modules[module] = Module(module, (height, specs[next(iter(parts))].shape[1]), parts)
    return modules


def why_not(module: Module, config: ModelConfig) -> str:
    """Why adapters of this module cannot be served; empty where they can."""
    name = next(iter(module.rows))
    if name in VOCABULARY:
        return "only matrices of layers can be adapted, not the embedding or the LM head"
    if config.attention.recurrent:
        return "adapters of recurrent models are not supported"
    if ".experts." in name:
        return "adapters of single experts are not supported"
    if name.split(".")[-2] not in WHOLE_INPUTS + CUT_INPUTS:
        return "this matrix is not used as one product and cannot be adapted"
    return ""


def open_factors(directory: Path) -> SafetensorsFile:
    """Raises CheckpointError where there is no safetensors file, or a damaged one."""
    path = directory / WEIGHTS_NAME
    if path.is_file():
        return SafetensorsFile(path)
    if (directory / PICKLE_NAME).is_file():
        raise CheckpointError(
            str(directory),
            f"holds its factors as a pickle ({PICKLE_NAME}), which is a program and is never loaded; "
            f"`flm-cluster convert {directory} NEW_DIRECTORY` reads it safely and writes safetensors",
        )
    raise CheckpointError(str(directory), f"expected {CONFIG_NAME} and {WEIGHTS_NAME}")


def factors_of(
    file: SafetensorsFile, modules: dict[str, Module], config: ModelConfig, settings: AdapterConfig
) -> dict[str, tuple[str, str]]:
    """Module → its tensors lora_A [R, K] and lora_B [N, R]. Raises CheckpointError for a tensor that is no factor, a module
    that the model does not have or that cannot be adapted, and a shape that is not the module's."""
    fail = lambda message: CheckpointError(str(file.path), message)
    found: dict[str, dict[str, str]] = {}
    for tensor in file.tensors:
        match = _TENSOR.fullmatch(tensor)
        if match is None:
            raise fail(
                f"tensor {tensor!r} is no factor (lora_A or lora_B) of a matrix; adapters have no others"
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise fail("holds no factors (lora_A and lora_B)")
    for name, pair in found.items():
        if name not in modules:
            raise fail(
                f"module {name!r} is not in the base model; adapted ones can be {_known(modules, config)}"
            )
        if why := why_not(modules[name], config):
            raise fail(f"module {name!r}: {why}")
        for kind in "AB":
            if kind not in pair:
                raise fail(f"module {name!r} has no lora_{kind}")
        (rows, cols), rank = modules[name].shape, settings.rank_of(name)
        for kind, shape in (("A", (rank, cols)), ("B", (rows, rank))):
            held = file.tensors[pair[kind]].shape
            if held != shape:
                raise fail(
                    f"tensor {pair[kind]!r}: shape {list(shape)} expected for a module of {[rows, cols]} and rank "
                    f"{rank}, found {list(held)}; the adapter is of another base model"
                )
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _known(modules: dict[str, Module], config: ModelConfig) -> str:
    """Modules that can be adapted, with N for numbers."""
    names = (re.sub(r"\.\d+\.", ".N.", m.name) for m in modules.values() if not why_not(m, config))
    return ", ".join(dict.fromkeys(names))
