"""MiniCPM: Llama's decoder with three scales. Granite's formula is the same."""

from __future__ import annotations

import math
from dataclasses import replace

from flm.worker.config import ModelConfig
from flm.worker.families import llama
from flm.worker.families.family import Family
from flm.worker.families.fields import Fields


def _read(fields: Fields) -> ModelConfig:
    config = llama.read(fields, "minicpm", default_tied=True)
    return replace(
        config,
        embedding_scale=fields.number("scale_emb", 1.0),
        residual_scale=fields.number("scale_depth", math.sqrt(config.layers)) / math.sqrt(config.layers),
        logit_scale=fields.number("dim_model_base", float(config.hidden)) / config.hidden,
    )


MINICPM = Family("minicpm", ("MiniCPMForCausalLM",), _read)
