"""What the kernels of GPUs cannot compute yet, told from a model's config before anything loads."""

from __future__ import annotations

from flm.kernels.adapter_ops import AdapterOps
from flm.kernels.classic_ops import ClassicOps
from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.cuda.rope import WIDEST_HEAD
from flm.kernels.expert_ops import ExpertOps
from flm.kernels.latent_ops import LatentOps
from flm.kernels.recurrent_ops import RecurrentOps
from flm.worker.config import ModelConfig


def missing_on_gpus(config: ModelConfig, adapters: bool = False) -> str:
    """Which part of the model no kernel of ours computes on a GPU; empty where it can be served there.

    adapters: whether it has any."""
    a = config.attention
    classic = config.norm.kind == "layer" or not config.feed_forward.gated
    needs = [
        (adapters, AdapterOps, "adapters"),
        (config.experts is not None, ExpertOps, "experts"),
        (a.latent is not None, LatentOps, "latent attention"),
        (a.recurrent, RecurrentOps, "recurrence"),
        (classic and not a.recurrent, ClassicOps, "LayerNorm and GELU"),
    ]
    lacking = [name for needed, ops, name in needs if needed and not issubclass(CudaBackend, ops)]
    if a.latent is None and not a.recurrent and a.head_dim > WIDEST_HEAD:
        lacking.append(f"heads wider than {WIDEST_HEAD}")
    return " and ".join(lacking)
