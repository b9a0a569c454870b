"""The matrices of one layer as a rank's layers hold them, not packed, so that tests can look at them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from flm.kernels.quant import QuantizedMatrix
from flm.kernels.reference import ReferenceBackend
from flm.worker.canonical import layer_prefix
from flm.worker.checkpoints.weights import ModelWeights
from flm.worker.layers.attention import Attention, Rotary
from flm.worker.layers.feed_forward import FeedForward
from flm.worker.layers.loading import Loading, Workspace


@dataclass(frozen=True)
class ShardLayer:
    qkv: QuantizedMatrix
    qkv_bias: Any
    output: QuantizedMatrix
    output_bias: Any
    gate_up: QuantizedMatrix
    gate_up_bias: Any
    down: QuantizedMatrix
    down_bias: Any


def layer_of(weights: ModelWeights, number: int) -> ShardLayer:
    backend = cast(Any, ReferenceBackend())
    loading = Loading(weights, backend, Workspace(backend, 1), pack=lambda matrix: cast(Any, matrix.whole()))
    prefix = layer_prefix(number)
    attention: Any = Attention(loading, prefix + "self_attn.", Rotary(loading, 1), cast(Any, None))
    mlp: Any = FeedForward(loading, prefix + "mlp.", weights.shard.intermediate)
    return ShardLayer(
        attention.qkv,
        attention.qkv_bias,
        attention.output,
        attention.output_bias,
        mlp.gate_up,
        mlp.gate_up_bias,
        mlp.down,
        mlp.down_bias,
    )
