"""How fast ranks load a checkpoint of about 2 GB, how much they read, and how much memory that takes.

Checkpoints with the shapes of Llama-3-8B, fewer layers and half its vocabulary, whose weights are noise. Their pages are dropped
from the system's cache, and the disk's sequential read is timed beside each load (they take turns). All ranks of a model load at
once, as they do when it is served.

Of /proc/self/io: what ranks asked the system for (rchar), over the bytes of their shards in the file; and what the disk read for
all of them together (read_bytes: whole pages, readahead included), over the file. Ranks share pages through the system's cache, so
a page counts for the rank that came first.

A virtual machine gets memory from its host when it uses it first, which can take longer than reading as much from the disk, and
gives it back soon after it is free. So the sequential read is into memory that was not used before, as weights are loaded; with
--held both go into memory that was.

Usage: python benchmarks/loading.py [--folder DIR] [--rounds 3] [--held] [--only bf16] [--ranks 1 2 4]
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dummy_checkpoints import LLAMA3_8B, write_directory, write_gguf
from numpy.typing import NDArray

from flm.kernels.cpu import arena
from flm.worker.canonical import decoder_tensors
from flm.worker.checkpoints.checkpoint import open_checkpoint
from flm.worker.conversion.convert import convert
from flm.worker.group.backends import open_backend
from flm.worker.group.group_spec import GroupSpec
from flm.worker.group.rank import Rank

BUFFER = 8 << 20
TARGETS = "at least 0.70 of the disk's sequential read, at most 1.05 of the shard read, at most 300 MB beside the shard"


def weight_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def forget(path: Path) -> None:
    """Drop the files' pages from the system's cache."""
    for each in weight_files(path):
        with each.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequential(path: Path, fresh: bool = False) -> float:
    """Bytes/s of reading the files from the disk, front to back, into one buffer, or each byte into memory that was not used
    before, as weights are."""
    forget(path)
    size = sum(each.stat().st_size for each in weight_files(path))
    memory = mmap.mmap(-1, size + BUFFER if fresh else BUFFER, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if fresh:
        memory.madvise(mmap.MADV_HUGEPAGE)
    view, at, start = memoryview(memory), 0, time.perf_counter()
    for each in weight_files(path):
        with each.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while got := file.readinto(view[at : at + BUFFER]):
                at += got if fresh else 0
    return size / (time.perf_counter() - start)


@dataclass(frozen=True)
class Load:
    """One rank's load. Bytes; asked: for which the system was asked; read: that the disk read for it; stored: of its weights in the
    file; held: of them as the rank keeps them; peak: resident memory beyond what the process had when it began."""

    seconds: float
    asked: int
    read: int
    stored: int
    held: int
    peak: int


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, field
    return int(found[1]) * 1024


def read_so_far() -> tuple[int, int]:
    """rchar and read_bytes."""
    text = Path("/proc/self/io").read_text()
    found = [re.search(rf"^{field}: (\d+)", text, re.MULTILINE) for field in ("rchar", "read_bytes")]
    assert found[0] is not None
    assert found[1] is not None
    return int(found[0][1]), int(found[1][1])


def hold_memory(size: int) -> None:
    """Let weights take memory that the process has used already, as long as there is some."""
    pool = arena.huge(size)
    pool[:: mmap.PAGESIZE] = 0
    more, at = arena.huge, 0

    def held(count: int) -> NDArray[np.uint8]:
        nonlocal at
        start, at = at, at + -(-count // arena.HUGE) * arena.HUGE
        return pool[start:at] if at <= size else more(count)

    arena.huge = held


def load_here(path: Path, quantization: str, ranks: int, number: int, held: bool) -> Load:
    """Load one rank in this process, when a line arrives."""
    if held:
        hold_memory(int(1.1 * sum(each.stat().st_size for each in weight_files(path)) / ranks))
    threads = max(len(os.sched_getaffinity(0)) // ranks, 1)
    open_backend("cpu", threads)  # kernels come from their own cache, not from the checkpoint
    spec = GroupSpec(
        "r",
        "dummy",
        str(path),
        tensor_parallel=ranks,
        threads=threads,
        quantization=quantization,
        kv_bytes=32 << 20,
    )
    rank = Rank(spec, number)
    print("ready", flush=True)
    sys.stdin.readline()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, reads, start = status("VmRSS"), read_so_far(), time.perf_counter()
    rank.load(lambda fraction: None)
    seconds, peak = time.perf_counter() - start, status("VmHWM") - before
    asked, read = (now - then for now, then in zip(read_so_far(), reads, strict=True))
    checkpoint, shard = open_checkpoint(path), rank.shard
    specs = decoder_tensors(shard.model)
    stored = sum(checkpoint.storage(name).nbytes * shard.share(spec.split) for name, spec in specs.items())
    return Load(seconds, asked, read, int(stored), sum(matrix.nbytes for matrix in packed(rank.model)), peak)  # type: ignore[attr-defined]


def packed(model: object) -> Iterator[object]:
    """Every packed matrix of a decoder."""
    decoder: object = model
    yield decoder.embedding  # type: ignore[attr-defined]
    yield decoder.lm_head  # type: ignore[attr-defined]
    for layer in decoder.layers:  # type: ignore[attr-defined]
        yield from (
            layer.attention.qkv,
            layer.attention.output,
            layer.feed_forward.gate_up,
            layer.feed_forward.down,
        )


def load_apart(path: Path, quantization: str, ranks: int, held: bool) -> list[Load]:
    """Load all ranks at once in fresh processes, from the disk."""
    started = []
    for number in range(ranks):
        arguments = [sys.executable, __file__, "--child", str(path), quantization, str(ranks), str(number)]
        arguments += ["--held"] if held else []
        started.append(subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for child in started:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    forget(path)
    loads = []
    for child in started:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in started:
        output, _ = child.communicate()
        assert child.returncode == 0, output
        loads.append(Load(**json.loads(output.splitlines()[-1])))
    return loads


def measure(label: str, path: Path, quantization: str, ranks: int, rounds: int, held: bool) -> None:
    """Sequential reads and loads, taking turns; prints medians."""
    speeds, took, all_loads = [], [], []
    size = sum(each.stat().st_size for each in weight_files(path))
    for _ in range(rounds):
        speeds.append(sequential(path, fresh=not held))
        loads = load_apart(path, quantization, ranks, held)
        took.append(max(load.seconds for load in loads))
        all_loads += loads
    middle = statistics.median
    share = middle(size / seconds / speed for seconds, speed in zip(took, speeds, strict=True))
    asked = max(load.asked / load.stored for load in all_loads)
    each = max(load.read / load.stored for load in all_loads)
    read = sum(load.read for load in all_loads) / rounds / size
    beside = max(load.peak - (0 if held else load.held) for load in all_loads)
    print(
        f"| {label} | {ranks} | {size / 1e9:.2f} GB | {asked:.3f} | {read:.3f} (most {each:.2f}) | {middle(took):.1f} s | "
        f"{share:.2f} of {middle(speeds) / 1e6:,.0f} MB/s ({min(speeds) / 1e6:,.0f} to {max(speeds) / 1e6:,.0f}) | "
        f"{beside / 1e6:+,.0f} MB |",
        flush=True,
    )


def checkpoints(folder: Path) -> dict[str, tuple[Callable[[], Path], str]]:
    """How each case's checkpoint is made, and the quantization it is loaded with."""
    shape, path = LLAMA3_8B, folder / "whole"
    bf16 = lambda: path if path.exists() else write_directory(path, shape, 3)
    made = lambda name, *arguments: (
        convert(bf16(), folder / name, *arguments, lambda done: None),
        folder / name,
    )[1]
    return {
        "bf16": (bf16, "auto"),
        "bf16, int8 online": (bf16, "int8"),
        "bf16, int4 online": (bf16, "int4"),
        "GPTQ int4": (lambda: write_directory(folder / "gptq", shape, 10, gptq=True), "auto"),
        "GGUF Q4_1": (lambda: write_gguf(folder / "q4_1.gguf", shape, 10, "Q4_1"), "auto"),
        "GGUF Q4_K": (lambda: write_gguf(folder / "q4_k.gguf", shape, 10, "Q4_K"), "auto"),
        "converted int8": (lambda: made("int8", "int8", 0), "auto"),
        "converted int4": (lambda: made("int4", "int4", 0), "auto"),
        "converted for 2": (lambda: made("cut", "auto", 2), "auto"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--child", nargs=4)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append")
    parser.add_argument("--held", action="store_true", help="into memory that was used before")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    if options.child:
        path, quantization, ranks, number = options.child
        print(json.dumps(vars(load_here(Path(path), quantization, int(ranks), int(number), options.held))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        print(f"wanted: {TARGETS}")
        for label, (make, quantization) in checkpoints(Path(temporary)).items():
            if options.only and label not in options.only:
                continue
            path = make()
            for ranks in [2] if label.endswith("for 2") else options.ranks:
                measure(label, path, quantization, ranks, options.rounds, options.held)


if __name__ == "__main__":
    main()
