"""A model as the gateway knows it: its description, its text side and its replicas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from flm.cluster.admission import Options
from flm.cluster.prompt_choice import BY_CHECKPOINT, PromptChoice, choose_template
from flm.cluster.replicas import Replicas
from flm.cluster.templates import ChatTemplate
from flm.proto import flm_pb2
from flm.worker.checkpoint import open_checkpoint
from flm.worker.config import ModelConfig
from flm.worker.errors import CheckpointError
from flm.worker.paths import resolve_model_path
from flm.worker.tokenizer import Tokenizer
from flm.worker.vocabularies.files import checked


@dataclass(frozen=True)
class ServedModel:
    """What the gateway has to be told of a model, whether a replica of it is up or not."""

    name: str
    path: str  # a directory, a .gguf file or package:<distribution>: where its tokenizer is
    max_context: int  # tokens, prompt and output together
    architecture: str = ""
    quantization: str = "auto"
    tensor_parallel: int = 1
    prompt: PromptChoice = BY_CHECKPOINT


class LoadedModel:
    """A served model with its tokenizer and template read."""

    def __init__(
        self, spec: ServedModel, tokenizer: Tokenizer, on_change: Callable[[], None], replica_key: str
    ) -> None:
        self.spec = spec
        words = read_words(spec.path, tokenizer, spec.prompt)
        self.tokenizer, self.template, own = words.tokenizer, words.template, words.eos_token_ids
        self.replicas = Replicas(spec.name, on_change, replica_key)
        self.wanted = 0
        ends = own or (() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
        self._eos_token_ids = tuple(sorted({*ends, *self.template.stop_ids}))
        self._more_ends = tuple(i for i in self._eos_token_ids if i not in own)
        self.token_text: Callable[[int], str] = lru_cache(maxsize=65536)(tokenizer.token_text)

    def with_ends(self, options: Options, *, chat: bool) -> Options:
        """The options with what ends an answer besides the ids that workers know; none for ignore_eos."""
        params = options.params
        if params.ignore_eos:
            return options
        ids = tuple(dict.fromkeys((*params.stop_token_ids, *self._more_ends)))
        strings = (*options.stops, *self.template.stop_strings) if chat else options.stops
        return replace(
            options, params=replace(params, stop_token_ids=ids), stops=tuple(dict.fromkeys(strings))
        )

    @property
    def ready(self) -> int:
        return self.replicas.router.num_ready

    def info(self) -> flm_pb2.ModelInfo:
        return flm_pb2.ModelInfo(
            name=self.spec.name,
            architecture=self.spec.architecture,
            max_context=self.spec.max_context,
            vocab_size=self.tokenizer.vocab_size,
            quantization=self.spec.quantization,
            tensor_parallel=self.spec.tensor_parallel,
            ready_replicas=self.ready,
            wanted_replicas=self.wanted,
            eos_token_ids=self._eos_token_ids,
            has_chat_template=not self.template.problem,
        )


@dataclass(frozen=True)
class Words:
    """A model's text side. eos_token_ids: those at which a worker ends a text by itself."""

    tokenizer: Tokenizer
    template: ChatTemplate
    eos_token_ids: tuple[int, ...]


def read_words(name: str, tokenizer: Tokenizer, prompt: PromptChoice) -> Words:
    """`tokenizer` beside the checkpoint `name`. CheckpointError where it has too many ids for it, ConfigError where
    `prompt` does not go with it."""
    path: Path | None = None
    config: ModelConfig | None = None
    try:
        path = resolve_model_path(name)
        config = open_checkpoint(path).config
    except CheckpointError:
        pass  # its replicas say what is wrong with it, when they load
    if config is not None:
        tokenizer = checked(tokenizer, config.vocab, name)
    template = choose_template(prompt, tokenizer, path)
    return Words(tokenizer, template, config.eos_token_ids if config is not None else ())
