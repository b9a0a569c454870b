"""The weights of a model by shape, from a checkpoint's header or from a config.json alone: what a plan counts.

Families that are planned here but not yet served by `worker` are read from their config.json's own fields.
"""

from __future__ import annotations

from dataclasses import dataclass

from flm.worker.canonical import EMBEDDING, LM_HEAD, decoder_tensors
from flm.worker.checkpoint import Checkpoint, open_checkpoint
from flm.worker.config import (
    AttentionConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
    ShardSpec,
    split_evenly,
)
from flm.worker.families import registry
from flm.worker.families.fields import Fields, read_json
from flm.worker.paths import resolve_model_path
from flm.worker.precision import parse_quantization
from flm.worker.tensor_source import Storage
from flm.worker.weights import shard_spec

FLOAT_BITS = {"float32": 32.0, "float16": 16.0, "bfloat16": 16.0}
_QWEN, _DEEPSEEK = "QWenLMHeadModel", "DeepseekV2ForCausalLM"
_NOT_SERVED = {name: f"{name} can be planned but not yet served" for name in (_QWEN, _DEEPSEEK)}


@dataclass(frozen=True)
class Weight:
    """`count` tensors alike of rows x cols weights. `split` names the axis that ranks share it by: heads, kv, ffn,
    vocab, experts, or whole (every rank holds all of it). `read` is the part that one token's decode reads."""

    name: str
    rows: int
    cols: int
    split: str
    storage: Storage
    count: int = 1
    read: float = 1.0

    @property
    def elements(self) -> int:
        return self.rows * self.cols * self.count

    def bits(self, quantization: str) -> float:
        """Bits per weight in memory, scales and offsets included, under the config's `quantization`."""
        if self.cols == 1:
            return 32.0  # vectors are kept in float32
        precision = parse_quantization(quantization)
        wanted = precision.wanted(self.name, self.storage.format)
        if wanted == self.storage.format:
            return self.storage.bits
        if wanted in FLOAT_BITS:
            return FLOAT_BITS[wanted]
        if self.storage.format == "int4":
            return self.storage.bits + 4  # the same codes in eight bits
        return (4 + 32 / precision.group) if wanted == "int4" else 8 + 16 / precision.group


@dataclass(frozen=True)
class Shapes:
    """A model by its shapes. `latent` is the width of an MLA cache entry (0: plain K and V of every KV head).
    `unservable` says why `up` could not serve it, empty where it can."""

    config: ModelConfig
    weights: tuple[Weight, ...]
    precision: str
    experts: int = 0
    latent: int = 0
    unservable: str = ""
    checkpoint: Checkpoint | None = None  # where there are weights

    def shard(self, tensor_parallel: int, rank: int, quantization: str) -> ShardSpec:
        """A rank's part, cut where the engine cuts. ConfigError where it cannot be cut so."""
        if self.checkpoint is not None:
            return shard_spec(self.checkpoint, tensor_parallel, rank, quantization)
        precision = parse_quantization(quantization)
        group = precision.group if precision.format in ("int4", "int8") else 1
        return ShardSpec(self.config, tensor_parallel, rank, group)

    @property
    def parameters(self) -> int:
        return sum(weight.elements for weight in self.weights)

    def share(self, split: str, shard: ShardSpec, expert_parallel: int) -> float:
        """The part of a weight with that split which one rank holds."""
        if split == "experts":
            spans = split_evenly(self.experts, expert_parallel)
            within = shard.tp_size // expert_parallel  # ranks that share an expert by its columns
            return spans[shard.tp_rank % expert_parallel].size / self.experts / within
        return shard.share(split)

    def kv_values_per_token(self, shard: ShardSpec) -> int:
        """Cached values per token on the rank that holds the most; an MLA cache is the same on every rank."""
        m = self.config
        heads = max(shard.for_rank(rank).kv_heads.size for rank in range(shard.tp_size))
        return m.layers * (self.latent or 2 * heads * m.attention.head_dim)


def read_shapes(path: str) -> Shapes:
    """The shapes of what lies at `path` (as in cluster.yaml). A directory may hold config.json alone.

    Raises CheckpointError where it is no model, or of a family that is not known."""
    found = resolve_model_path(path)
    if found.is_file() or any(found.glob("*.safetensors")):
        checkpoint = open_checkpoint(found)
        weights = _decoder(checkpoint.config, {n: checkpoint.storage(n) for n in checkpoint.shapes})
        return Shapes(checkpoint.config, weights, checkpoint.quantization, checkpoint=checkpoint)
    fields = read_json(found / "config.json")
    names = fields.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    dtype = fields.get("torch_dtype") or fields.get("dtype") or "bfloat16"
    if dtype not in FLOAT_BITS:
        raise fields.fail(f"torch_dtype: one of {', '.join(FLOAT_BITS)} expected, found {dtype!r}")
    storage = Storage.of_floats(dtype, 0)
    if architecture == _DEEPSEEK:
        return _deepseek_v2(fields, storage)
    config = _qwen(fields) if architecture == _QWEN else registry.read_config(found)[0]
    weights = _decoder(config, dict.fromkeys(decoder_tensors(config), storage))
    reason = f"{found} holds config.json but no weights (*.safetensors)"
    return Shapes(config, weights, dtype, unservable=_NOT_SERVED.get(architecture, reason))


def _decoder(config: ModelConfig, storage: dict[str, Storage]) -> tuple[Weight, ...]:
    """A decoder's weights. An embedding that is not also the head is read one row per token."""
    weights = []
    for name, spec in decoder_tensors(config).items():
        read = 1 / config.vocab if name == EMBEDDING and not config.tie_embeddings else 1.0
        cols = spec.shape[1] if len(spec.shape) == 2 else 1
        weights.append(Weight(name, spec.shape[0], cols, spec.split, storage[name], read=read))
    return tuple(weights)


def _qwen(fields: Fields) -> ModelConfig:
    """Qwen (the first): Llama with biases on q, k, v. `intermediate_size` counts gate and up together."""
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    return ModelConfig(
        family="qwen",
        hidden=hidden,
        layers=fields.integer("num_hidden_layers"),
        vocab=fields.integer("vocab_size"),
        max_position=fields.integer("seq_length"),
        norm=NormConfig(fields.number("layer_norm_epsilon")),
        attention=AttentionConfig(
            heads=heads,
            kv_heads=heads,
            head_dim=fields.integer("kv_channels", hidden // heads),
            rope=RopeConfig(theta=fields.number("rotary_emb_base", 10000.0)),
            qkv_bias=True,
        ),
        feed_forward=FeedForwardConfig(fields.integer("intermediate_size") // 2),
    )


def _deepseek_v2(fields: Fields, storage: Storage) -> Shapes:
    """DeepSeek-V2 (arXiv:2405.04434): multi-head latent attention and routed experts."""
    hidden, layers, heads = (
        fields.integer(n) for n in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    nope, rope, value, rank = (
        fields.integer(n) for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    experts, top_k = fields.integer("n_routed_experts"), fields.integer("num_experts_per_tok")
    width, dense = fields.integer("moe_intermediate_size"), fields.integer("first_k_dense_replace")
    config = ModelConfig(
        family="deepseek_v2",
        hidden=hidden,
        layers=layers,
        vocab=fields.integer("vocab_size"),
        max_position=fields.integer("max_position_embeddings"),
        norm=NormConfig(fields.number("rms_norm_eps")),
        attention=AttentionConfig(
            heads=heads,
            kv_heads=heads,
            head_dim=nope + rope,
            rope=RopeConfig(theta=fields.number("rope_theta", 10000.0), rotary_dim=rope),
        ),
        feed_forward=FeedForwardConfig(fields.integer("intermediate_size")),
    )
    sparse, shared = layers - dense, width * fields.integer("n_shared_experts")
    query = fields.get("q_lora_rank")
    rows: list[tuple[str, int, int, str, int, float]] = [
        (EMBEDDING, config.vocab, hidden, "vocab", 1, 1 / config.vocab),
        (LM_HEAD, config.vocab, hidden, "vocab", 1, 1.0),
        ("norms", hidden, 1, "whole", 2 * layers + 1, 1.0),
        ("kv_a", rank + rope, hidden, "whole", layers, 1.0),
        ("kv_a_norm", rank, 1, "whole", layers, 1.0),
        ("kv_b", heads * (nope + value), rank, "heads", layers, 1.0),
        ("output", hidden, heads * value, "heads", layers, 1.0),
        ("dense mlp", 3 * config.feed_forward.intermediate, hidden, "ffn", dense, 1.0),
        ("router", experts, hidden, "whole", sparse, 1.0),
        ("shared experts", 3 * shared, hidden, "ffn", sparse, 1.0),
        ("experts", 3 * width * experts, hidden, "experts", sparse, top_k / experts),
    ]
    if query is None:
        rows.append(("q", heads * (nope + rope), hidden, "heads", layers, 1.0))
    else:
        rows.append(("q_a", int(query), hidden, "whole", layers, 1.0))
        rows.append(("q_a_norm", int(query), 1, "whole", layers, 1.0))
        rows.append(("q_b", heads * (nope + rope), int(query), "heads", layers, 1.0))
    weights = tuple(Weight(n, r, c, split, storage, count, read) for n, r, c, split, count, read in rows)
    return Shapes(config, weights, storage.label, experts, rank + rope, _NOT_SERVED[_DEEPSEEK])
