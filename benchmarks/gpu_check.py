"""Everything that can be said of this project on a machine with a GPU, in one go of less than eight minutes.

    PYTHONPATH=.typing python benchmarks/gpu_check.py [--only tests,library,decode] [--seconds 475] [--out FOLDER]

Stages are processes of their own, each with a time limit: one that fails, hangs or breaks the GPU's context takes nothing from
the others, and what it had measured until then is kept. Results are written after every stage, to <device>.json. Kernel tests
on the device against the reference, the engine on golden checkpoints, two processes that share the GPU as the ranks of a
replica and NCCL's calls come first, then speed, then compute-sanitizer over one test of each kernel. Needs cupy, NVRTC
(extras cuda13, dev) and no Ray; what else is missing costs the tests that need it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests/kernels/cuda"
CHECKED = (
    "test_elementwise.py",
    "test_classic.py",
    "test_experts.py",
    "test_latent.py",
    "test_rope.py",
    "test_linear.py",
    "test_attention.py",
    "test_sampling.py",
    "test_between_gpus.py",
)
CHOSEN = "not faults and not golden and (schedules or take or alone or group_of_one or route)"
LIMIT = 475.0  # seconds of all stages together
TEST_NAME = re.compile(r"tests/\S+")
SHORTEST = 10.0  # seconds that a stage must have left
GRACE = 5.0  # seconds for a stage to end what it runs
BROKEN = 77  # status of a stage that lost the GPU's context with one of its parts
NO_DEVICE = 78  # status of a stage that found no GPU that can be used


@dataclass(frozen=True)
class Stage:
    """A command, the seconds it may take, and whether its failure is the check's."""

    name: str
    command: Sequence[str]
    seconds: float
    required: bool = True


def pytest_command(*arguments: str, processes: int = 1) -> list[str]:
    """pytest over kernel tests, with what is installed here of its plugins: the project's own options want all of them."""
    has = lambda name: importlib.util.find_spec(name) is not None
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=--import-mode=importlib", "--continue-on-collection-errors"]
    command += ["--timeout=90"] if has("pytest_timeout") else []
    command += ["-n", str(processes), "--dist", "loadfile"] if processes > 1 and has("xdist") else []
    return [*command, *arguments]


def sanitizer() -> str:
    """Where compute-sanitizer would be."""
    return shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def missing_tools() -> list[str]:
    """Programs that stages would need."""
    return [] if Path(sanitizer()).exists() else ["compute-sanitizer, of the CUDA toolkit"]


def stages() -> list[Stage]:
    """In order: what would be missed most first."""
    speed = lambda name, seconds: Stage(name, [sys.executable, "benchmarks/gpu_speed.py", name], seconds)
    made = [
        speed("facts", 60),
        Stage("tests", pytest_command(TESTS, processes=6), 210),
        speed("library", 60),
        speed("decode", 90),
        speed("prompts", 70),
        speed("products", 60),
        speed("kernels", 80),
        speed("peers", 40),
    ]
    tool = sanitizer()
    paths = [f"{TESTS}/{name}" for name in CHECKED]
    for kind in ("memcheck", "racecheck") if not missing_tools() else ():
        watched = (tool, "--tool", kind, "--error-exitcode", "99", "--target-processes", "all")
        made.append(Stage(kind, [*watched, *pytest_command(*paths, "-k", CHOSEN)], 75, False))
    return made


def run_stage(stage: Stage, seconds: float) -> dict[str, Any]:
    """What became of it: passed, seconds, the rows that it wrote, the tests that failed, and its last words where it did."""
    with tempfile.TemporaryDirectory() as folder:
        rows, output = Path(folder, "rows"), Path(folder, "output")
        paths = [str(ROOT / ".typing"), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {"FLM_TEST_GPU": "1", "FLM_ROWS": str(rows), "PYTHONPATH": os.pathsep.join(paths)}
        start, command = time.monotonic(), list(stage.command)
        status = first = run_process(command, seconds, env, output)
        while status == BROKEN and (left := seconds - (time.monotonic() - start)) > 0:
            behind = json.loads(rows.read_text().splitlines()[-1])["part"] + 1  # of the part that broke it
            status = run_process([*command, str(behind)], left, env, output)
        status = None if status is None else first
        said = output.read_text(errors="replace").splitlines()
        found: dict[str, Any] = {"passed": status == 0, "seconds": round(time.monotonic() - start, 1)}
        found |= {"no_device": True} if status == NO_DEVICE else {}
        found |= {
            "rows": [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        }
    if any("pytest" in word for word in stage.command):
        # where several processes share the tests, a name stands behind its result
        found["passing"] = sum(" PASSED" in line for line in said)
        wrong = (
            TEST_NAME.search(line)
            for line in said
            if "FAILED " in line or "ERROR " in line or " FAILED" in line
        )
        found["failing"] = sorted({name[0] for name in wrong if name})
    if status is None:
        found["said"] = f"not done after {seconds:.0f} s"
    elif status and stage.command[0] == sys.executable and len(said) > 0:
        found["said"] = said[-1]
    if status != 0:
        found["tail"] = said[-60:]
    return found


def run_process(command: Sequence[str], seconds: float, env: dict[str, str], output: Path) -> int | None:
    """Its status; None where it had to be ended. What it says is added to `output`."""
    with output.open("ab") as file:  # no pipe, which what a killed stage leaves behind would hold open
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | env, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_session(process)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a stage and whatever it started: first asked, so that workers go too, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def check(made: Sequence[Stage], limit: float, folder: Path) -> tuple[dict[str, Any], Path]:
    """Run the stages within `limit` seconds together; the results, and the file that has them after every stage."""
    end, results = time.monotonic() + limit, {"device": "no GPU"}  # type: tuple[float, dict[str, Any]]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "no_gpu.json"
    for stage in made:
        left = end - time.monotonic()
        if left < SHORTEST:
            results[stage.name] = {"passed": False, "said": "no time was left", "rows": []}
        else:
            print(f"{stage.name}: up to {min(stage.seconds, left):.0f} s", flush=True)
            results[stage.name] = run_stage(stage, min(stage.seconds, left))
        found = results[stage.name]
        for row in found["rows"] if stage.name == "facts" else ():
            results |= row
            path = folder / f"{results['device'].lower().replace(' ', '_')}.json"
        show(stage.name, found)
        path.write_text(json.dumps(results, indent=2) + "\n")
        if "no_device" in found:
            break  # no other stage could do anything
    return results, path


def show(name: str, found: dict[str, Any]) -> None:
    """A stage's rows as lines, and why it failed where it did."""
    for row in found["rows"]:
        print("  ".join(f"{v:.4g}" if isinstance(v, float) else str(v).ljust(44) for v in row.values()))
    if not found["passed"]:
        print("\n".join([*found.get("tail", []), *found.get("failing", [])]))
    count = f", {found['passing']} tests passed" if "passing" in found else ""
    print(f"{name}: {'done' if found['passed'] else 'FAILED ' + found.get('said', '')}", end="")
    print(f" in {found.get('seconds', 0):.0f} s{count}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="names of stages, with commas; all where it is not given")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="for all stages together")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results"
    )
    options = parser.parse_args()
    wanted = {"facts", *filter(None, options.only.split(","))}
    chosen = [stage for stage in stages() if not options.only or stage.name in wanted]
    results, path = check(chosen, options.seconds, options.out)
    failed = [stage.name for stage in chosen if not results.get(stage.name, {"passed": False})["passed"]]
    print(f"-> {path}", f"failed: {', '.join(failed)}" if failed else "all passed")
    if any(stage.required and stage.name in failed for stage in chosen):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
