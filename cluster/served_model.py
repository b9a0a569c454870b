"""A model as the gateway knows it: its description, its text side and its replicas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from flm.cluster.replicas import Replicas
from flm.cluster.templates import ChatTemplate
from flm.proto import flm_pb2
from flm.worker.checkpoint import open_checkpoint
from flm.worker.errors import CheckpointError
from flm.worker.paths import resolve_model_path
from flm.worker.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """What the gateway has to be told of a model, whether a replica of it is up or not."""

    name: str
    path: str  # a directory, a .gguf file or package:<distribution>: where its tokenizer is
    max_context: int  # tokens, prompt and output together
    architecture: str = ""
    quantization: str = "auto"
    tensor_parallel: int = 1


class LoadedModel:
    """A served model with its tokenizer and template read."""

    def __init__(
        self, spec: ServedModel, tokenizer: Tokenizer, on_change: Callable[[], None], replica_key: str
    ) -> None:
        self.spec, self.tokenizer = spec, tokenizer
        self.template = ChatTemplate(
            tokenizer.chat_template, tokenizer.bos_token or "", tokenizer.eos_token or ""
        )
        self.replicas = Replicas(spec.name, on_change, replica_key)
        self.wanted = 0
        self._eos_token_ids = _eos_token_ids(spec.path, tokenizer)
        self.token_text: Callable[[int], str] = lru_cache(maxsize=65536)(self._token_text)

    def _token_text(self, token_id: int) -> str:
        """Of the token within a text: decode() takes the space from the front of a whole one."""
        pieces = self.tokenizer.pieces
        if pieces is None:
            return self.tokenizer.decode([token_id], False)
        return pieces[token_id].decode("utf-8", "replace")

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
            has_chat_template=self.tokenizer.chat_template is not None,
        )


def _eos_token_ids(path: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Those at which a worker ends a text: the checkpoint's, which may be more than the tokenizer's one."""
    try:
        return open_checkpoint(resolve_model_path(path)).config.eos_token_ids
    except CheckpointError:  # its replicas say what is wrong with it, when they load
        return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
