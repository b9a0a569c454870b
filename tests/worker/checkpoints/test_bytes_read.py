"""What a rank asks the system for, as the system counts it: its shard, and next to nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packed_model import METHODS, drawing, write_model

from flm.kernels.reference import ReferenceBackend
from flm.worker.canonical import decoder_tensors
from flm.worker.checkpoints.checkpoint import open_checkpoint
from flm.worker.checkpoints.weights import load_weights, shard_spec
from flm.worker.communication.comm import LocalCommunicator
from flm.worker.conversion.convert import convert
from flm.worker.execution.model import Decoder
from flm.worker.files import byte_file

COUNTER = Path("/proc/self/io")
CASES = [("floats", "auto"), ("floats", "int8"), ("floats", "int4:group=64"), ("gptq", "auto"), ("awq", "auto"),
         ("fp8", "auto"), ("compressed", "auto"), ("converted", "auto"), ("cut", "auto")]  # fmt: skip


def copied() -> int:
    """Bytes that the system gave this process since it began."""
    return int(COUNTER.read_text().split()[1])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("models"), dict[str, Path]()
    for method in ("gptq", "awq", "fp8", "compressed"):
        extra = {"quantization_config": METHODS[method]}
        found[method], found["floats"] = write_model(folder / method, drawing(method), extra)
    for name, ranks in (("converted", 0), ("cut", 2)):
        found[name] = folder / name
        convert(found["floats"], found[name], "int4:group=64", ranks, lambda _: None)
    return found


@pytest.mark.skipif(not COUNTER.exists(), reason="Linux counts what a process reads")
@pytest.mark.parametrize(("name", "quantization"), CASES)
def test_a_rank_reads_its_shard(
    models: dict[str, Path], name: str, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_file, "SHORT_PIECE", 8)  # rows are a sixteenth of real ones
    checkpoint = open_checkpoint(models[name])
    for rank in range(2):
        shard = shard_spec(checkpoint, 2, rank, quantization)
        specs = decoder_tensors(shard.model).items()
        stored = sum(checkpoint.storage(n).nbytes * shard.share(spec.split) for n, spec in specs)
        weights = load_weights(checkpoint, shard, quantization, lambda _: None)
        caches: Any = [None] * shard.model.layers
        before = copied()
        Decoder(weights, ReferenceBackend(), LocalCommunicator(), caches, 1, 1, 1)
        assert stored * 0.98 <= copied() - before <= stored * 1.05
