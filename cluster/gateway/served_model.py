"""A model as the gateway knows it: its description, its text side and its replicas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from flm.cluster.gateway.admission import Options
from flm.cluster.gateway.replicas import Replicas
from flm.cluster.prompts.generation_config import read_sampling
from flm.cluster.prompts.prompt_choice import BY_CHECKPOINT, PromptChoice, choose_template
from flm.cluster.prompts.rendering import Renderer
from flm.cluster.prompts.templates import ChatTemplate
from flm.cluster.settings.config import ModelSection
from flm.cluster.state import ModelFacts
from flm.proto import flm_pb2
from flm.worker.errors import AdapterNotFound
from flm.worker.files.paths import resolve_model_path
from flm.worker.vocabularies.files import checked, load_tokenizer
from flm.worker.vocabularies.tokenizer import Tokenizer


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
    rows: int = 0  # of its embedding, 0 where that is not known
    eos_token_ids: tuple[int, ...] = ()  # those at which a worker ends a text by itself
    generation_config: bool = True  # whether that of the checkpoint says how to sample by default
    adapters: tuple[str, ...] = ()  # their names


def served_model(model: ModelSection, facts: ModelFacts) -> ServedModel:
    """A model of cluster.yaml, with what the plan learnt of its checkpoint."""
    return ServedModel(
        model.name,
        model.path,
        facts.max_context,
        facts.architecture,
        facts.precision,
        model.tensor_parallel,
        model.prompt,
        facts.rows,
        facts.eos_token_ids,
        model.generation_config == "auto",
        tuple(model.adapters),
    )


@dataclass(frozen=True)
class Words:
    """A model's text side. `sampling`: what the fields of a request mean that it does not set."""

    tokenizer: Tokenizer
    template: ChatTemplate
    sampling: Mapping[str, float] = field(default_factory=dict)


def read_words(spec: ServedModel, load: Callable[[Path], Tokenizer] = load_tokenizer) -> Words:
    """Read what lies beside a model's weights; up to a second of work. `load` reads the tokenizer.

    CheckpointError where that is missing, broken or has too many ids for the model, ConfigError where the prompt that
    cluster.yaml asks for does not go with it."""
    path = resolve_model_path(spec.path)
    tokenizer = load(path)
    if spec.rows:
        tokenizer = checked(tokenizer, spec.rows, spec.path)
    sampling = read_sampling(path) if spec.generation_config else {}
    return Words(tokenizer, choose_template(spec.prompt, tokenizer, path), sampling)


class LoadedModel:
    """A served model with its tokenizer and template read. Belongs to one event loop."""

    def __init__(
        self, spec: ServedModel, words: Words, on_change: Callable[[], None], replica_key: str
    ) -> None:
        self.spec, self.tokenizer, self.template = spec, words.tokenizer, words.template
        self.sampling = words.sampling
        self.chats = Renderer(spec.name, words.template, words.tokenizer)
        self.replicas = Replicas(spec.name, on_change, replica_key)
        own, last = spec.eos_token_ids, words.tokenizer.eos_token_id
        ends = own or (() if last is None else (last,))
        self._eos_token_ids = tuple(sorted({*ends, *self.template.stop_ids}))
        self._more_ends = tuple(i for i in self._eos_token_ids if i not in own)
        self.token_text: Callable[[int], str] = lru_cache(maxsize=65536)(words.tokenizer.token_text)

    def with_adapter(self, options: Options, name: str) -> Options:
        """The options for an adapter, "" for none. Raises AdapterNotFound."""
        if name and name not in self.spec.adapters:
            raise AdapterNotFound(name, self.spec.adapters)
        return replace(options, params=replace(options.params, adapter=name)) if name else options

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
            wanted_replicas=self.replicas.wanted or 0,
            eos_token_ids=self._eos_token_ids,
            has_chat_template=not self.template.problem,
            adapters=self.spec.adapters,
        )

    async def close(self) -> None:
        """Calls to its replicas end, and conversations that wait to be rendered."""
        self.chats.close()
        await self.replicas.close()
