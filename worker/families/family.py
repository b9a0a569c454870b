"""Family: what the engine has to know of one kind of checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from flm.worker.canonical import decoder_tensors
from flm.worker.config import ModelConfig
from flm.worker.files.json_fields import Fields
from flm.worker.tensors.recipe import Recipe


def same_names(config: ModelConfig) -> dict[str, Recipe]:
    """A checkpoint under canonical names."""
    return {name: Recipe(name) for name in decoder_tensors(config)}


def renamed(
    config: ModelConfig,
    stems: Mapping[str, str],
    layers: str,
    other: Callable[[str, str, str], Recipe],
) -> dict[str, Recipe]:
    """A checkpoint with names of its own. `stems`: its name for each of ours without the kind (weight, bias), of a layer's
    parts without the layer; `layers`: what stands before the number of a layer. `other` gives the recipe of what stems
    do not name, from our part's name, the checkpoint's prefix of that layer, and the kind."""
    recipes = {}
    for name in decoder_tensors(config):
        part, kind = name.rsplit(".", 1)
        prefix = ""
        if part.startswith("model.layers."):
            _, _, layer, part = part.split(".", 3)
            prefix = f"{layers}{layer}."
        same = part in stems
        recipes[name] = Recipe(f"{prefix}{stems[part]}.{kind}") if same else other(part, prefix, kind)
    return recipes


def side_by_side(config: ModelConfig, part: str, tensor: str, head_order: tuple[int, ...] = ()) -> Recipe:
    """self_attn.q_proj, k_proj or v_proj out of a matrix that holds q, k and v of one head after the other.
    `head_order`: of the rows that rotate."""
    at, d = "qkv".index(part.removeprefix("self_attn.")[0]), config.attention.head_dim
    return Recipe(tensor, at * d, d, 3 * d, head_order if at < 2 else ())


def thirds(config: ModelConfig, part: str, tensor: str) -> Recipe:
    """self_attn.q_proj, k_proj or v_proj out of a matrix that holds q, k and v one below the other."""
    a = config.attention
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    return Recipe(tensor, {"q": 0, "k": q, "v": q + kv}[part.removeprefix("self_attn.")[0]])


@dataclass(frozen=True)
class Family:
    """`read` makes the decoder's description of config.json, `recipes` says where each canonical tensor lies.

    `architectures`: as in config.json; where two families share one, `accepts` tells them apart. `ignored`: patterns of
    tensors that hold no weights (tables and masks of old checkpoints). `optional_prefix`: of tensor names, left out by
    checkpoints of the bare decoder. `extra_layers`: layers past the last are passed over."""

    name: str
    architectures: tuple[str, ...]
    read: Callable[[Fields], ModelConfig]
    recipes: Callable[[ModelConfig], dict[str, Recipe]] = same_names
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    accepts: Callable[[Fields], bool] = lambda fields: True
    optional_prefix: str = ""
    extra_layers: bool = False

    @property
    def model_type(self) -> str:
        """config.json's other name for it."""
        return "chatglm" if self.name == "chatglm_6b" else self.name

    def locate(self, config: ModelConfig, names: Iterable[str]) -> dict[str, Recipe]:
        """The recipes for a checkpoint with tensors of those names."""
        recipes, prefix = self.recipes(config), self.optional_prefix
        if not prefix or any(name.startswith(prefix) for name in names):
            return recipes
        return {n: replace(r, tensor=r.tensor.removeprefix(prefix)) for n, r in recipes.items()}

    def is_ignored(self, tensor: str, layers: int) -> bool:
        """Whether a model of so many layers has no use for it."""
        number = tensor.removeprefix("model.layers.").split(".")[0]
        if self.extra_layers and number.isdecimal() and int(number) >= layers:
            return True
        return any(fnmatchcase(tensor, pattern) for pattern in self.ignored)
