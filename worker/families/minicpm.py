"""MiniCPM and Granite: Llama's decoder with scales of the embedding, of what layers add, and of the logits."""

from __future__ import annotations

import math
from dataclasses import replace

from flm.worker.config import ModelConfig
from flm.worker.families import llama
from flm.worker.families.family import Family
from flm.worker.files.json_fields import Fields


def _minicpm(fields: Fields) -> ModelConfig:
    config = llama.read(fields, "minicpm", default_tied=True)
    return replace(
        config,
        embedding_scale=fields.number("scale_emb", 1.0),
        residual_scale=fields.number("scale_depth", math.sqrt(config.layers)) / math.sqrt(config.layers),
        logit_scale=fields.number("dim_model_base", float(config.hidden)) / config.hidden,
    )


def _granite(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", False)
    config = llama.read(fields, "granite", qkv_bias=bias, output_bias=bias)
    return replace(
        config,
        attention=replace(config.attention, score_scale=fields.number("attention_multiplier", 1.0)),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_scale=1.0 / fields.number("logits_scaling", 1.0),
    )


MINICPM = Family("minicpm", ("MiniCPMForCausalLM",), _minicpm)
GRANITE = Family("granite", ("GraniteForCausalLM",), _granite)
