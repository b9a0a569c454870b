"""Baichuan: Llama's decoder with q, k and v in one matrix; the 13B ones see positions by ALiBi, the second generation
divides the rows of its head by their norms. config.json says neither, so the sizes of the releases decide."""

from __future__ import annotations

from dataclasses import replace

from flm.worker.canonical import LM_HEAD, decoder_tensors
from flm.worker.config import ModelConfig, RopeConfig
from flm.worker.families import hub, llama
from flm.worker.families.family import Family, thirds
from flm.worker.files.json_fields import Fields
from flm.worker.tensors.recipe import Recipe

_FIRST_7B = "BaiChuanForCausalLM"
_ROPE_WIDTH, _ALIBI_WIDTH, _SECOND_VOCAB = 4096, 5120, 125696


def _read(fields: Fields) -> ModelConfig:
    config = llama.read(fields, "baichuan")
    second = config.vocab == fields.integer("_v2_vocab", _SECOND_VOCAB) or "z_loss_weight" in fields.raw
    longest = fields.integer("model_max_length", config.max_position)
    config = replace(config, max_position=longest, unit_head=second)
    if not _has_alibi(fields):
        return config
    return replace(config, attention=replace(config.attention, rope=RopeConfig(), alibi=True))


def _has_alibi(fields: Fields) -> bool:
    """By the width of the releases; of other widths, those without a bound on positions."""
    hidden = fields.integer("hidden_size")
    if hub.architecture(fields) == _FIRST_7B or hidden == _ROPE_WIDTH:
        return False
    return hidden == _ALIBI_WIDTH or fields.get("max_position_embeddings") is None


def _recipes(config: ModelConfig) -> dict[str, Recipe]:
    recipes = {}
    for name in decoder_tensors(config):
        stem, kind = name.rsplit(".", 1)
        part = stem.rsplit(".", 2)
        if part[-1] in ("q_proj", "k_proj", "v_proj"):
            recipes[name] = thirds(config, ".".join(part[-2:]), f"{part[0]}.self_attn.W_pack.{kind}")
        else:
            recipes[name] = Recipe(name, unit_rows=name == LM_HEAD and config.unit_head)
    return recipes


BAICHUAN = Family("baichuan", (_FIRST_7B, "BaichuanForCausalLM"), _read, _recipes)
