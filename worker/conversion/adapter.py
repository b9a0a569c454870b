"""A LoRA adapter whose factors are a pickle, written as safetensors; the pickle's code is never run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from flm.worker.adapters.config import CONFIG_NAME
from flm.worker.adapters.file import PICKLE_NAME, WEIGHTS_NAME
from flm.worker.files.paths import resolve_model_path
from flm.worker.files.pickle_file import PickleFile
from flm.worker.files.safetensors_writer import SafetensorsWriter


def is_adapter(directory: Path) -> bool:
    """Whether it holds an adapter rather than a model."""
    return (directory / CONFIG_NAME).is_file() and not (directory / "config.json").is_file()


def resolve_source(source: str) -> Path:
    """The adapter's directory, or the model, that `source` means. Raises CheckpointError where it is neither."""
    path = Path(source).expanduser()
    return path if is_adapter(path) else resolve_model_path(source)


def convert_adapter(source: Path, target: Path, on_progress: Callable[[float], None]) -> None:
    """Fill the directory `target`. Raises CheckpointError for a file that is no plain dictionary of tensors."""
    shutil.copyfile(source / CONFIG_NAME, target / CONFIG_NAME)
    if (source / WEIGHTS_NAME).is_file():
        shutil.copyfile(source / WEIGHTS_NAME, target / WEIGHTS_NAME)
        on_progress(1.0)
        return
    file = PickleFile(source / PICKLE_NAME)
    with SafetensorsWriter(target / WEIGHTS_NAME, list(file.tensors)) as writer:
        for done, (name, entry) in enumerate(file.tensors.items(), 1):
            writer.add(name, entry.dtype, file.read(name))
            on_progress(done / len(file.tensors))
