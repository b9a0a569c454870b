"""Write a checkpoint in another form: weights quantised already, pickles as safetensors, or cut for a number of ranks.

The target appears whole or not at all: it is written beside its place and moved there at the end.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flm.worker.checkpoints.checkpoint import Checkpoint, open_checkpoint, open_pickles
from flm.worker.conversion.adapter import convert_adapter, is_adapter
from flm.worker.conversion.calibration import calibrated
from flm.worker.conversion.prepare import write_weights
from flm.worker.conversion.shards import write_shards
from flm.worker.errors import ConfigError
from flm.worker.packing.config import SEPARATE_FILES
from flm.worker.tensors.precision import parse_quantization

WEIGHT_ENDINGS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".npz",
    ".index.json",
)
PACKING_FIELDS = ("quantization_config", "compression_config", "quantization_bit", "wbits", "groupsize")
LARGEST_COPIED = (
    64 << 20
)  # tokenizers and templates; nothing of this size that is no weight file belongs to a model
CALIBRATED = 0.97  # of the work of a calibrated conversion, when only the writing is left

Progress = Callable[[float], None]


def convert(
    source: Path,
    target: Path,
    quantization: str,
    tensor_parallel: int,
    on_progress: Progress,
    expert_parallel: bool = False,
    calibrate: bool = False,
) -> None:
    """Convert the directory `source`, a model or a LoRA adapter, into the new directory `target`.

    quantization: as in cluster.yaml. tensor_parallel: 0 for weights that any number of ranks can load, else one file for
    each of that many ranks, with expert_parallel as in cluster.yaml. on_progress gets 0 to 1. calibrate: run the model first, to
    round to int4 with regard to what comes into each matrix. Raises ConfigError and CheckpointError; then nothing is left."""
    if source.suffix == ".gguf":
        raise ConfigError(
            f"{source}: a directory expected; a .gguf file is quantised already, and each rank reads its own part of it",
            field="source",
        )
    if not source.is_dir():
        raise ConfigError(f"{source}: a directory with config.json and weights expected", field="source")
    if expert_parallel and not tensor_parallel:
        raise ConfigError("a number of ranks expected", field="tensor_parallel")
    if target.exists():
        raise ConfigError(f"{target} exists already; name a new directory", field="target")
    if is_adapter(source):
        if quantization != "auto" or tensor_parallel or calibrate:
            raise ConfigError(
                "auto expected, for any number of ranks: adapters are kept as they are", field="quantization"
            )
        with _appearing(target) as partial:
            convert_adapter(source, partial, on_progress)
        return
    pickled = not any(source.glob("*.safetensors"))
    if calibrate:
        part = lambda fraction: on_progress(CALIBRATED * fraction)
        checkpoint = _calibrated(source, pickled, quantization, tensor_parallel, part)
    else:
        checkpoint = open_pickles(source) if pickled else open_checkpoint(source)
    begun = CALIBRATED if calibrate else 0.0
    report = lambda fraction: on_progress(begun + (1 - begun) * fraction)
    with _appearing(target) as partial:
        _copy_beside(source, partial)
        if tensor_parallel:
            extra = write_shards(checkpoint, partial, quantization, tensor_parallel, expert_parallel, report)
        else:
            extra = write_weights(checkpoint, partial, quantization, report)
        _write_config(source / "config.json", partial / "config.json", extra)


def _calibrated(
    source: Path, pickled: bool, quantization: str, tensor_parallel: int, on_progress: Progress
) -> Checkpoint:
    precision = parse_quantization(quantization)
    if precision.format != "int4" or tensor_parallel:
        raise ConfigError(
            "int4 for any number of ranks expected; cut the result in a second step", field="calibrate"
        )
    if pickled:
        raise ConfigError("safetensors expected; convert the pickles first", field="calibrate")
    return calibrated(source, precision, on_progress)


def _copy_beside(source: Path, target: Path) -> None:
    """Tokenizer, templates and licences: every small file that is neither weights nor code."""
    for path in sorted(source.iterdir()):
        unwanted = path.name.endswith((*WEIGHT_ENDINGS, ".py")) or path.name in SEPARATE_FILES
        if path.is_file() and not unwanted and path.stat().st_size <= LARGEST_COPIED:
            shutil.copyfile(path, target / path.name)


def _write_config(source: Path, target: Path, extra: dict[str, Any]) -> None:
    """config.json with `extra` in place of what it said of the old packing."""
    config = json.loads(source.read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in PACKING_FIELDS}
    target.write_text(json.dumps(kept | extra, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when the block ends without an error and is removed otherwise. What an
    earlier, killed conversion left there is removed first."""
    partial = target.parent / f".{target.name}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise _unwritten(target, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{target} is being written by another conversion", field="target") from error
        _empty(partial)
        try:
            yield partial
            for path in partial.iterdir():
                _sync(path)
            os.fsync(lock)
            partial.rename(target)
            _sync(target.parent)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):  # the disk is full, or fails; what is read has errors of its own
                raise _unwritten(target, error) from error
            raise
    finally:
        os.close(lock)


def _unwritten(target: Path, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    where = f" ({error.filename})" if error.filename else ""
    return ConfigError(f"{target} cannot be written: {reason}{where}; nothing is left of it", field="target")


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
