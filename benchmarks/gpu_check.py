"""Everything that can be said of this project on a machine with a GPU, in one go; meant to take under eight minutes.

    PYTHONPATH=.typing python benchmarks/gpu_check.py [--only tests,sanitizer,speed]

Kernel tests on the device against the reference, the engine on golden checkpoints, two processes that share the GPU as the
ranks of a replica, NCCL's calls, compute-sanitizer over one test of each kernel, then speed. Needs cupy, NVRTC (extras cuda13, dev) and no Ray. Writes benchmarks/results/<device>.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_decode
import gpu_dummy
import gpu_kernels
import gpu_peers

from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.cuda.device import CupyDevice

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


TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096)
SAMPLING = {
    "greedy": (0.0,),
    "drawn": (1.0,),
    "top_p 0.9": (1.0, 0, 0.9),
    "top_k 50, top_p 0.9": (1.0, 50, 0.9),
}


def run_pytest(*arguments: str, prefix: tuple[str, ...] = (), timeout: float) -> dict[str, Any]:
    """One pytest run with the kernels on the device: its last line, seconds, and whether all passed."""
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    env = os.environ | {"FLM_TEST_GPU": "1", "PYTHONPATH": str(ROOT / ".typing")}
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "said": f"not done after {timeout:g} s", "seconds": timeout}
    lines = [*done.stdout.strip().splitlines(), *done.stderr.strip().splitlines()]
    if done.returncode:
        print("\n".join(lines[-60:]))
    said = lines[-1] if lines else ""
    return {"passed": done.returncode == 0, "said": said, "seconds": time.monotonic() - start}


def sanitized() -> dict[str, Any]:
    """memcheck and racecheck over one test of each kernel."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"passed": None, "said": "compute-sanitizer is not installed"}
    found = {}
    for kind in ("memcheck", "racecheck"):
        prefix = (tool, "--tool", kind, "--error-exitcode", "99", "--target-processes", "all")
        paths = [f"{TESTS}/{name}" for name in CHECKED]
        found[kind] = run_pytest(*paths, "-k", CHOSEN, prefix=prefix, timeout=90)
    return found


def timer(device: CupyDevice) -> Callable[[list[Callable[[], None]]], float]:
    """Seconds of a call, of many made one after another, by the device's clock."""
    import cupy

    def measure(calls: list[Callable[[], None]]) -> float:
        for call in calls[:3]:
            call()
        rounds = max(1, 64 // len(calls))
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        graph = device.record([call for _ in range(rounds) for call in calls])  # no launch cost from here
        graph()
        start.record()
        graph()
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3 / (rounds * len(calls))

    return measure


def copy_rate(device: CupyDevice) -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    import cupy

    a, b = (device.empty((1 << 30,), "uint8") for _ in range(2))
    cupy.copyto(b, a)
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    for _ in range(10):
        cupy.copyto(b, a)
    end.record()
    end.synchronize()
    return 10 * 2 * a.nbytes / (float(cupy.cuda.get_elapsed_time(start, end)) / 1e3)


def product_speed(
    device: Any, time_of: gpu_kernels.Timer, rate: float, n: int, enough: int, tokens: tuple[int, ...]
) -> list[gpu_kernels.Measured]:
    """Products with n outputs of as many inputs, in every format."""
    k, results = max(n, 128), []
    for format in ("int4", "int8", "float"):
        for m in tokens:
            calls, nbytes = gpu_kernels.linear_calls(device, n, k, m, format, "bfloat16", enough)
            what = f"{format} product {n}x{k}, {m} tokens"
            results.append(gpu_kernels.measure(what, calls, nbytes, time_of, rate, 2.0 * m * n * k))
    return results


def kernel_speed(
    device: Any, time_of: gpu_kernels.Timer, rate: float, small: bool = False
) -> list[dict[str, Any]]:
    """Every kernel of kernels.md's table that is there. small: sizes for a machine without a GPU."""
    n, context, vocab, enough = (64, 48, 1000, 1) if small else (8192, 4096, 152064, 256 << 20)
    results = product_speed(device, time_of, rate, n, enough, (1, 2) if small else TOKENS)
    for tokens, before in ((4, 32),) if small else ((4096, 0), (512, 3584)):
        for kv in ("bfloat16", "int8"):
            heads = (4, 2, 64) if small else (32, 8, 128)
            calls, nbytes, flops = gpu_kernels.prefill_calls(device, tokens, before, heads, kv, "bfloat16")
            what = f"attention, {tokens} tokens of a prompt behind {before}, {kv} cache"
            results.append(gpu_kernels.measure(what, calls, nbytes, time_of, rate, flops))
    for kv in ("bfloat16", "int8"):
        batch, heads = (2, (4, 2, 64)) if small else (32, (32, 8, 128))
        calls, nbytes = gpu_kernels.attention_calls(device, batch, context, heads, kv, "bfloat16", enough)
        what = f"attention, {batch} x {context} tokens, {kv} cache"
        results.append(gpu_kernels.measure(what, calls, nbytes, time_of, rate))
    dummy = gpu_dummy.DummyBackend(device)
    experts = (dummy, (8, 64, 32)) if small else (dummy, (64, 2048, 1408))
    for tokens in (1, 2) if small else (1, 8, 64):
        for what, (calls, nbytes) in gpu_dummy.expert_calls(*experts, tokens, 3 if small else 6).items():
            results.append(gpu_kernels.measure(what, calls, nbytes, time_of, rate))
    for batch in (1, 2) if small else (1, 32):
        heads = (2, 16, 8) if small else (16, 512, 64)
        calls, nbytes = gpu_dummy.latent_calls(dummy, batch, context, heads)
        what = f"latent attention, {batch} x {context} tokens"
        results.append(gpu_kernels.measure(what, calls, nbytes, time_of, rate))
    for tokens in (1, 4) if small else (1, 4096):
        for what, (calls, nbytes) in gpu_kernels.small_calls(device, tokens, n, "bfloat16").items():
            results.append(gpu_kernels.measure(what, calls, nbytes, time_of, rate))
    for rows in (1,) if small else (1, 16):
        for what, options in SAMPLING.items():
            calls, nbytes = gpu_kernels.sampling_calls(device, rows, vocab, *options)
            results.append(
                gpu_kernels.measure(f"sampling {rows}x{vocab}, {what}", calls, nbytes, time_of, rate)
            )
    return gpu_kernels.as_rows(results)


def decode_speed(device: CupyDevice, rate: float) -> list[dict[str, Any]]:
    """Whole decode steps, in graphs, of 1,024 tokens of context."""
    import cupy

    rows = []
    for shape, format, M in (
        (gpu_decode.LLAMA_8B, "int4", 1), (gpu_decode.LLAMA_8B, "float", 1), (gpu_decode.LLAMA_8B, "int4", 8),
        (gpu_decode.QWEN_72B, "int4", 1),
    ):  # fmt: skip
        step = gpu_decode.DecodeStep(CudaBackend(device), shape, format, M, 1024)
        seconds = replay_time(step.record())
        rows.append(gpu_decode.results_of(step, seconds, rate) | {"format": format})
        del step
        cupy.get_default_memory_pool().free_all_blocks()
    for model, M in (
        (gpu_dummy.DEEPSEEK_V2_LITE, 1), (gpu_dummy.DEEPSEEK_V2_LITE, 16), (gpu_dummy.QWEN3_30B, 1),
    ):  # fmt: skip
        dummy = gpu_dummy.DummyStep.build(gpu_dummy.DummyBackend(device), model, M, 1024)
        seconds = replay_time(dummy.record())
        rows.append(gpu_dummy.results_of(dummy, seconds, rate) | {"format": "int4"})
        del dummy
        cupy.get_default_memory_pool().free_all_blocks()
    return rows


def replay_time(graph: Any) -> float:
    """Seconds of a recorded step, which ends with the sampled ids on the host."""
    for _ in range(3):
        graph.replay()
    start = time.perf_counter()
    for _ in range(20):
        graph.replay()
    return (time.perf_counter() - start) / 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="tests,sanitizer,speed")
    wanted = parser.parse_args().only.split(",")
    device = CupyDevice()
    results: dict[str, Any] = {"device": device.name, "compute_capability": device.arch / 10}
    if "tests" in wanted:
        results["tests"] = run_pytest(TESTS, timeout=240)
    if "sanitizer" in wanted:
        results["sanitizer"] = sanitized()
    if "speed" in wanted:
        time_of = timer(device)
        rate = copy_rate(device)
        results["copy_gigabytes_per_second"] = rate / 1e9
        results["kernels"] = kernel_speed(device, time_of, rate)
        results["peers"] = gpu_peers.peer_speed(8192, TOKENS, rate)
        results["decode"] = decode_speed(device, rate)
    path = ROOT / "benchmarks" / "results" / f"{device.name.lower().replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    for row in [*results.get("kernels", []), *results.get("peers", []), *results.get("decode", [])]:
        print("  ".join(f"{v:.4g}" if isinstance(v, float) else str(v).ljust(44) for v in row.values()))
    print({key: results.get(key) for key in ("tests", "sanitizer")}, f"-> {path}")
    if not results.get("tests", {"passed": True})["passed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
