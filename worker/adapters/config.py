"""adapter_config.json of a LoRA adapter, as PEFT writes it: rank and scale of each module, and what cannot be served."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flm.worker.files.json_fields import Fields, read_json

CONFIG_NAME = "adapter_config.json"
# field, the values that can be served, why others cannot
_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("peft_type", ("LORA",), "only LoRA adapters can be served"),
    ("use_dora", (None, False), "DoRA rescales the rows of the base model's weights, which all requests share"),
    ("bias", (None, "none"), "biases belong to the base model, which all requests share"),
    ("lora_bias", (None, False), "biases of adapters are not supported"),
    ("modules_to_save", (None, []), "modules that were trained whole, such as lm_head or embeddings, belong to a model of their own"),
    ("trainable_token_indices", (None, [], {}), "trained embeddings belong to a model of their own"),
    ("layer_replication", (None, [], {}), "a base model with repeated layers is another model"),
    ("fan_in_fan_out", (None, False), "transposed weights are not supported"),
    ("use_qalora", (None, False), "pooled inputs (QALoRA) are not supported"),
    ("alora_invocation_tokens", (None, []), "adapters that begin within a prompt (aLoRA) are not supported"),
    ("target_parameters", (None, []), "adapters of single parameters, such as stacked experts, are not supported"),
)  # fmt: skip
# these begin with factors of the base model's own weights, and leave it with what is left
_CHANGING_INIT = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class AdapterConfig:
    """base: what the adapter says it was trained on, perhaps empty. Patterns are regular expressions of module names'
    ends; the first that matches holds."""

    file: Path
    base: str
    rank: int
    alpha: float
    root: bool  # scale by the rank's square root (rsLoRA, arXiv:2312.03732)
    ranks: tuple[tuple[str, int], ...]
    alphas: tuple[tuple[str, float], ...]

    def rank_of(self, module: str) -> int:
        return next((rank for pattern, rank in self.ranks if _matches(pattern, module)), self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of the factors is multiplied by."""
        alpha = next((alpha for pattern, alpha in self.alphas if _matches(pattern, module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.root else rank)


def _matches(pattern: str, module: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Raises CheckpointError with the field, what was found and why it cannot be served."""
    fields = read_json(directory / CONFIG_NAME)
    for name, allowed, why in _REFUSED:
        found = fields.get(name)
        if found not in allowed:
            raise fields.fail(f"{name}: {found!r:.80} cannot be served: {why}")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGING_INIT):
        raise fields.fail(
            f"init_lora_weights: {start!r} cannot be served: it changes the base model's weights; save the adapter "
            "converted to plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    rank = fields.integer("r")
    return AdapterConfig(
        fields.file,
        str(fields.get("base_model_name_or_path") or ""),
        rank,
        fields.number("lora_alpha", 8.0),
        fields.flag("use_rslora", False),
        tuple((pattern, of.integer(pattern)) for pattern, of in _patterns(fields, "rank_pattern")),
        tuple((pattern, of.number(pattern)) for pattern, of in _patterns(fields, "alpha_pattern")),
    )


def _patterns(fields: Fields, name: str) -> list[tuple[str, Fields]]:
    section = fields.section(name)
    if section is None:
        return []
    for pattern in section.raw:
        try:
            re.compile(pattern)
        except re.error as error:
            raise fields.fail(f"{name}: {pattern!r} is no regular expression: {error}") from error
    return [(pattern, section) for pattern in section.raw]
