"""How fast a rank loads a checkpoint of 2 GB, how much it reads, and how much memory that takes.

A dummy bfloat16 checkpoint is written, its pages are dropped from the system's cache, and the disk's sequential read is
timed beside each load (they take turns). Bytes are those of /proc/self/io: what came from the disk, readahead included.

A rank among several reads pieces of rows of two matrices a layer, and a disk gives whole pages; a checkpoint that was
converted for that many ranks has no such pieces.

Usage: python benchmarks/loading.py [--folder DIR] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flm.worker.conversion.convert import convert
from flm.worker.group.backends import open_backend
from flm.worker.group.rank import GroupSpec, Rank

HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCAB = 2048, 5632, 18, 16, 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCAB,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip
BUFFER = 8 << 20
TARGETS = "at least 0.70 of the disk's sequential read, at most 1.05 of the shard read, at most 300 MB beside the shard"


def shapes() -> dict[str, tuple[int, ...]]:
    """The dummy's tensors."""
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    tensors["model.norm.weight"] = (HIDDEN,)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
        tensors |= {f"{prefix}self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
        tensors |= {f"{prefix}mlp.{n}_proj.weight": (INTERMEDIATE, HIDDEN) for n in ("gate", "up")}
        tensors[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    return tensors


def write_dummy(folder: Path) -> Path:
    """The dummy checkpoint; its weights are random numbers near 1, the same block over and over."""
    header, at = {}, 0
    for name, shape in shapes().items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    block = np.random.default_rng(0).integers(0x3F00, 0x3F80, BUFFER // 2, dtype=np.uint16).tobytes()
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, at, BUFFER):
            file.write(block[: min(BUFFER, at - start)])
        file.flush()
        os.fsync(file.fileno())
    return path


def forget(path: Path) -> None:
    """Drop the file's pages from the system's cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequential(path: Path) -> float:
    """Bytes/s of reading the file from the disk, front to back."""
    forget(path)
    buffer = bytearray(BUFFER)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while file.readinto(buffer):
            pass
    return path.stat().st_size / (time.perf_counter() - start)


@dataclass(frozen=True)
class Load:
    """One load. Bytes; `shard`: of the weights as the rank keeps them; `peak`: resident memory beyond what the process had
    when it began."""

    seconds: float
    read: int
    shard: int
    peak: int


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, field
    return int(found[1]) * 1024


def disk_reads() -> int:
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def load_here(folder: Path, ranks: int) -> Load:
    """Load rank 0 in this process."""
    open_backend("cpu", 2)  # kernels come from their own cache, not from the checkpoint
    spec = GroupSpec("r", "dummy", str(folder), tensor_parallel=ranks, threads=2)
    rank = Rank(spec, 0)
    before, reads, start = status("VmRSS"), disk_reads(), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    rank.load(lambda fraction: None)
    seconds, read, peak = time.perf_counter() - start, disk_reads() - reads, status("VmHWM") - before
    held = sum(array.nbytes for array in packed(rank.model))
    return Load(seconds, read, held, peak)


def packed(model: object) -> list[object]:
    """Every packed matrix of a decoder."""
    decoder: object = model
    found = [decoder.embedding, decoder.lm_head]  # type: ignore[attr-defined]
    for layer in decoder.layers:  # type: ignore[attr-defined]
        found += [
            layer.attention.qkv,
            layer.attention.output,
            layer.feed_forward.gate_up,
            layer.feed_forward.down,
        ]
    return found


def load_apart(folder: Path, ranks: int) -> Load:
    """Load rank 0 in a fresh process, from the disk."""
    for path in folder.glob("*.safetensors"):
        forget(path)
    arguments = [sys.executable, __file__, "--child", str(folder), str(ranks)]
    output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    return Load(**json.loads(output.splitlines()[-1]))


def measure(label: str, folder: Path, ranks: int, rounds: int) -> None:
    """Sequential reads and loads of rank 0, taking turns; prints the median load."""
    shares, loads, speeds = [], [], []
    for _ in range(rounds):
        speed = sequential(next(folder.glob("*.safetensors")))
        load = load_apart(folder, ranks)
        loads.append(load)
        speeds.append(speed)
        shares.append(load.shard / load.seconds / speed)
    middle = sorted(loads, key=lambda load: load.seconds)[len(loads) // 2]
    print(
        f"{label}: {middle.seconds:.1f} s, {middle.read / 1e6:,.0f} MB read = {middle.read / middle.shard:.3f} of the shard, "
        f"at {statistics.median(shares):.2f} of {statistics.median(speeds) / 1e6:,.0f} MB/s, "
        f"peak {(middle.peak - middle.shard) / 1e6:+,.0f} MB beside {middle.shard / 1e6:,.0f} MB of weights",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--child", nargs=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(vars(load_here(Path(options.child[0]), int(options.child[1])))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder, cut = Path(temporary) / "whole", Path(temporary) / "cut"
        folder.mkdir()
        size = write_dummy(folder).stat().st_size
        print(f"{size / 1e9:.2f} GB; wanted: {TARGETS}")
        measure("1 rank", folder, 1, options.rounds)
        measure("rank 0 of 2", folder, 2, options.rounds)
        convert(folder, cut, "auto", 2, lambda fraction: None)
        measure("rank 0 of 2, converted for 2", cut, 2, options.rounds)


if __name__ == "__main__":
    main()
