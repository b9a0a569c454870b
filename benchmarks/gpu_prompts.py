"""Whole prompts through a model of random weights, in one step: products by our tiles, and by cuBLASLt.

Shape legend: T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import gpu_dummy
import numpy as np

from flm.kernels.cuda.library_products import LibraryProducts
from flm.kernels.cuda.pack import CudaMatrix
from flm.worker.communication.comm import LocalCommunicator
from flm.worker.config import ModelConfig
from flm.worker.execution.caches import make_caches
from flm.worker.execution.model import Decoder
from flm.worker.layers.loading import StepInputs

Row = dict[str, Any]
TOKENS = (512, 1024, 2048, 4096)
TIMES = 3


class DummyPrompt:
    """One sequence's prompt of up to T tokens."""

    def __init__(self, backend: gpu_dummy.DummyBackend, model: ModelConfig, T: int) -> None:
        weights: Any = gpu_dummy.ShapedWeights(model)
        self.backend, self.model, blocks = backend, model, -(-T // 16)
        caches = make_caches(backend, weights.shard, blocks, 16, backend.activation, 1)
        self.decoder = Decoder(weights, backend, LocalCommunicator(), caches, T, T, 1)
        numbers = np.arange(T, dtype=np.int32)
        self._numbers_T = backend.asarray(numbers)
        self._ids_T = backend.asarray(numbers % model.vocab)
        self._zeros_T = backend.asarray(numbers * 0)
        self._tables = backend.asarray(np.arange(blocks, dtype=np.int32)[None])

    @property
    def weights(self) -> int:
        """How many the layers' products have."""
        parts = [p for layer in self.decoder.layers for p in (layer.attention, layer.feed_forward)]
        found = [w for part in parts for w in vars(part).values() if isinstance(w, CudaMatrix)]
        return sum(w.shape[0] * w.shape[1] for w in found)

    def run(self, T: int) -> Any:
        """Logits of the last of T tokens."""
        at = self._numbers_T[:T]
        inputs = StepInputs(self._ids_T[:T], at, at, self._zeros_T[:T], self._tables, at, at)
        last = self._numbers_T[T - 1 : T]
        return self.decoder.logits(self.decoder.hidden(inputs), last)

    def seconds(self, T: int) -> float:
        """Of one run, the best of a few; logits are brought to the host."""
        self.backend.to_host(self.run(T))
        best = float("inf")
        for _ in range(TIMES):
            start = time.perf_counter()
            self.backend.to_host(self.run(T))
            best = min(best, time.perf_counter() - start)
        return best


def prompt_speed(
    device: Any,
    library: LibraryProducts,
    model: ModelConfig = gpu_dummy.LLAMA_8B,
    tokens: tuple[int, ...] = TOKENS,
) -> Iterator[Callable[[], Iterator[Row]]]:
    """For int4 and 16-bit weights, rows of prompts of these lengths, exact and by cuBLASLt."""
    for format in ("int4", "float"):
        yield lambda f=format: _prompts(device, library, model, tokens, f)  # type: ignore[misc]


def _prompts(
    device: Any, library: LibraryProducts, model: ModelConfig, tokens: tuple[int, ...], format: str
) -> Iterator[Row]:
    backend = gpu_dummy.DummyBackend(device, library=library)
    backend.format = format
    prompt = DummyPrompt(backend, model, max(tokens))
    backend.prepare(lambda: [prompt.run(T) for T in tokens] and None, 1, lambda done: None)
    for T in tokens:
        for name, used in (("exact", None), ("cublas", library)):
            backend.library = used
            seconds = prompt.seconds(T)
            yield {
                "what": f"{model.family} prompt, {T} tokens, {format} weights, matmul {name}",
                "milliseconds": seconds * 1e3,
                "tokens_per_second": T / seconds,
                "teraflops": 2.0 * prompt.weights * T / seconds / 1e12,
            }
