"""What the kernels of GPUs cannot compute, told from a model's config before anything loads."""

from __future__ import annotations

from flm.kernels.cuda.experts import MOST_CHOICES, MOST_EXPERTS, MOST_GROUPS
from flm.kernels.cuda.latent import WIDEST
from flm.kernels.cuda.rope import WIDEST_HEAD
from flm.worker.config import ModelConfig


def missing_on_gpus(config: ModelConfig) -> str:
    """What of the model no kernel of ours computes on a GPU; empty where it can be served there."""
    a, e = config.attention, config.experts
    latent = a.latent.rank if a.latent else 0
    limits = [
        (0 if latent or a.recurrent else a.head_dim, WIDEST_HEAD, "heads wider than"),
        (latent, WIDEST, "latents wider than"),
        (e.count if e else 0, MOST_EXPERTS, "experts more than"),
        (e.routing.top_k if e else 0, MOST_CHOICES, "experts per token more than"),
        (e.routing.groups if e else 0, MOST_GROUPS, "groups of experts more than"),
    ]
    return " and ".join(f"{what} {most}" for value, most, what in limits if value > most)
