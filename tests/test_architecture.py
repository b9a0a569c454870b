"""The rules the code base keeps: who imports whom, how long things get, what is generated and what is shipped."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cluster", "worker", "kernels", "proto")
ALLOWED = {
    "cluster": {"cluster", "worker", "kernels", "proto"},
    "worker": {"worker", "kernels"},
    "kernels": {"kernels"},
    "proto": {"proto"},
}
# the rooms of a package, each of which knows only those before it; `state` is what cluster's tell each other on disk
ROOMS = {
    "cluster": [
        {"state"},
        {"prompts"},
        {"settings"},
        {"wire"},
        {"planning", "client"},
        {"gateway"},
        {"control"},
        {"replica"},
        {"actors"},
        {"launch"},
        {"cli"},
    ],
    "worker": [
        {"errors", "config_parts"},
        {"config", "request"},
        {"canonical", "limits", "plan"},
        {"files"},
        {"tensors"},
        {"families", "packing", "vocabularies"},
        {"checkpoints"},
        {"adapters"},
        {"communication", "layers"},
        {"execution"},
        {"scheduling"},
        {"group"},
        {"engine"},
        {"conversion"},
    ],
}
# third-party package -> the files or folders that may import it
CONFINED = {
    "ray": ("cluster/actors.py",),
    "grpc": ("cluster/", "proto/"),
    "cupy": ("kernels/", "worker/communication/comm.py"),
}
CONFINED |= {"torch": (), "transformers": (), "grpc_health": ("cluster/",), "grpc_reflection": ("cluster/",)}
STUBS = ("flm_pb2.py", "flm_pb2.pyi", "flm_pb2_grpc.py")
MAX_FILE, MAX_CUDA_FILE, MAX_FUNCTION = 300, 400, 50


def sources(*folders: str) -> list[Path]:
    """Hand-written Python files below `folders`."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if path.name not in STUBS)


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports, at its top or anywhere inside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            if node.module in ("flm", "flm.cluster", "flm.worker"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def room_of(name: str) -> int | None:
    """The number of the room, in its package, that a dotted name of flm leads to."""
    _, package, room = name.split(".")[:3]
    return next((i for i, rooms in enumerate(ROOMS[package]) if room in rooms), None)


def arrow_violations(source: str, place: str) -> list[str]:
    """What `source`, standing at `place` (a path from the root), imports against the rules."""
    wrong = []
    own = ".".join(["flm", *place.removesuffix(".py").split("/")])
    package = place.split("/")[0]
    floor = room_of(own) if package in ROOMS else None
    for name in imports(ast.parse(source)):
        parts = name.split(".")
        if parts[0] == "flm" and parts[1] not in ALLOWED[package]:
            wrong.append(f"{place} imports {name}")
        # a package's own __init__ offers names from every room
        rooms = package in ROOMS and place != f"{package}/__init__.py"
        if rooms and parts[:2] == ["flm", package] and parts[2:3] != own.split(".")[2:3]:
            there = room_of(name)
            if there is None or floor is None or there >= floor:
                wrong.append(f"{place} imports {name}")
        if parts[0] in CONFINED and not place.startswith(CONFINED[parts[0]]):
            wrong.append(f"{place} imports {name}")
    return wrong


def long_functions(source: str, place: str) -> list[str]:
    functions = (
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    spans = ((f.name, (f.end_lineno or f.lineno) - f.lineno + 1) for f in functions)
    return [f"{place}: {name} has {lines} lines" for name, lines in spans if lines > MAX_FUNCTION]


def package_folders() -> set[str]:
    """Folders of the four packages that hold Python files, as dotted flm names."""
    files = (
        path for top in PACKAGES for path in (ROOT / top).rglob("*.py") if "__pycache__" not in path.parts
    )
    return {"flm." + ".".join(path.parent.relative_to(ROOT).parts) for path in files}


def test_arrows_are_kept() -> None:
    places = {path: path.relative_to(ROOT).as_posix() for path in sources(*PACKAGES)}
    wrong = [v for path, place in places.items() for v in arrow_violations(path.read_text(), place)]
    assert places
    assert not wrong


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("kernels/quant.py", "from flm.worker.config import Span"),
        ("worker/engine.py", "from flm.cluster import actors"),
        ("cluster/gateway/router.py", "from flm.cluster.control.group import Group"),
        ("cluster/client/calls.py", "from flm.cluster.planning.plan import Plan"),
        ("cluster/control/group.py", "from flm.cluster import actors"),
        ("worker/engine.py", "def f():\n    import grpc.aio"),
        ("worker/engine.py", "from flm import proto"),
        ("worker/files/gguf_file.py", "from flm.worker.checkpoints.weights import Weights"),
        ("worker/layers/norm.py", "from flm.worker.execution import runner"),
        ("cluster/control/controller.py", "import ray"),
        ("cluster/gateway/gateway.py", "import cupy as cp"),
        ("proto/__main__.py", "import flm.worker"),
    ],
)
def test_a_broken_arrow_is_seen(place: str, source: str) -> None:
    assert len(arrow_violations(source, place)) == 1


def test_files_and_functions_stay_short() -> None:
    python = dict.fromkeys(sources(*PACKAGES, "tests", "benchmarks", ".ci"), MAX_FILE)
    cuda = dict.fromkeys((ROOT / "kernels").rglob("*.cu*"), MAX_CUDA_FILE)
    texts = {
        path.relative_to(ROOT).as_posix(): (path.read_text(), limit)
        for path, limit in (python | cuda).items()
    }
    lines = {place: (text.count("\n"), limit) for place, (text, limit) in texts.items()}
    wrong = [
        f"{place} has {count} lines, at most {limit}"
        for place, (count, limit) in lines.items()
        if count > limit
    ]
    for place, (text, _) in texts.items():
        wrong += long_functions(text, place) if place.endswith(".py") else []
    assert not wrong


def test_a_long_function_is_seen() -> None:
    assert long_functions("def f():\n" + "    x = 1\n" * MAX_FUNCTION, "x.py") == ["x.py: f has 51 lines"]


def test_the_wheel_ships_every_package() -> None:
    """A package missing from the list works in an editable install and is silently absent from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(package_folders())


def test_there_is_no_proto_init() -> None:
    """With proto/__init__.py, running from the root would hide proto-plus' `proto`, which Ray may import."""
    assert not (ROOT / "proto" / "__init__.py").exists()


def test_committed_stubs_are_fresh(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is a development dependency")
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-I",
        str(ROOT / ".typing"),
        *outputs,
        "flm/proto/flm.proto",
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    made = {name: (tmp_path / "flm" / "proto" / name).read_text() for name in STUBS}
    stale = [name for name in STUBS if made[name] != (ROOT / "proto" / name).read_text()]
    assert not stale, "run `make stubs` and commit the result"
