"""One stage of gpu_check.py that measures: rows are written as they come, to the file that FLM_ROWS names.

PYTHONPATH=.typing python benchmarks/gpu_speed.py facts|products|library|kernels|peers|decode|prompts [FIRST PART]

Where a part breaks the GPU's context, all later ones of the process would fail with it: it ends with the status BROKEN, and
another goes on behind that part.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any

import gpu_check
import gpu_decode
import gpu_dummy
import gpu_engine
import gpu_kernels
import gpu_peers
import gpu_products
import gpu_prompts

from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.cuda.cublas_lt import find_library
from flm.kernels.cuda.device import CupyDevice
from flm.kernels.cuda.kernel_list import KernelList
from flm.kernels.cuda.library_products import open_library
from flm.kernels.errors import CompileError, KernelError

Row = dict[str, Any]
BROKEN = gpu_check.BROKEN
STAGES = ("facts", "library", "decode", "prompts", "products", "kernels", "peers")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096)
SAMPLING = {
    "greedy": (0.0,),
    "drawn": (1.0,),
    "top_p 0.9": (1.0, 0, 0.9),
    "top_k 50, top_p 0.9": (1.0, 50, 0.9),
}
SHOWN = (
    "cupy-cuda13x",
    "cupy-cuda12x",
    "numpy",
    "torch",
    "nvidia-cublas",
    "nvidia-cuda-nvrtc",
    "nvidia-nccl-cu13",
)
WANTED = ("ml_dtypes", "msgpack", "numba", "zmq", "tokenizers", "pytest", "pytest_timeout", "xdist", "torch")


def write(row: Row) -> None:
    """Add a row to the stage's file, at once."""
    text = json.dumps(row)
    print(text, flush=True)
    if "FLM_ROWS" in os.environ:
        with open(os.environ["FLM_ROWS"], "a", encoding="utf-8") as file:
            file.write(text + "\n")


def keep(
    parts: Iterable[Callable[[], Iterable[Row]]], check: Callable[[], None] = lambda: None, first: int = 0
) -> int:
    """Write what the parts give, from number `first` on; the exit status. One that fails leaves the others as they are, unless
    `check` raises after it: then the GPU failed too."""
    status = 0
    for number, part in enumerate(parts):
        if number < first:
            continue
        try:
            for row in part():
                write(row)
        except Exception as error:
            status = 1
            traceback.print_exc()
            write({"what": "failed", "part": number, "error": f"{type(error).__name__}: {error}"[:500]})
            try:
                check()
            except KernelError as broken:
                print(broken)
                return BROKEN
    return status


def timer(device: CupyDevice) -> gpu_kernels.Timer:
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


def prepared(
    device: CupyDevice,
    measured: Callable[[Any, gpu_kernels.Timer], list[Callable[[], Iterator[gpu_kernels.Measured]]]],
) -> list[Callable[[], Iterable[Row]]]:
    """Parts that measure, what they launch compiled all at once; what cannot be compiled fails where it is launched."""
    listing = KernelList(device)

    def once(calls: list[Callable[[], None]]) -> float:
        calls[0]()
        return 1.0

    for part in measured(listing, once):
        list(part())
    try:
        device.prepare(listing.kernels)
    except CompileError:
        traceback.print_exc()
    rows = lambda part: (row for one in part() for row in gpu_kernels.as_rows([one]))
    return [lambda part=part: rows(part) for part in measured(device, timer(device))]  # type: ignore[misc]


def kernel_speed(
    device: Any, time_of: gpu_kernels.Timer, rate: float, small: bool = False
) -> list[Callable[[], Iterator[gpu_kernels.Measured]]]:
    """Every kernel but products, in parts. small: sizes for a machine without a GPU."""
    n, context, vocab, enough = (64, 48, 1000, 1) if small else (8192, 4096, 152064, 256 << 20)
    measure = lambda what, made, flops=0.0: gpu_kernels.measure(what, *made, time_of, rate, flops)
    heads = (4, 2, 64) if small else (32, 8, 128)
    dummy = gpu_dummy.DummyBackend(device)

    def prompts() -> Iterator[gpu_kernels.Measured]:
        for tokens, before in ((4, 32),) if small else ((4096, 0), (512, 3584)):
            for kv in ("bfloat16", "int8"):
                *made, flops = gpu_kernels.prefill_calls(device, tokens, before, heads, kv, "bfloat16")
                what = f"attention, {tokens} tokens of a prompt behind {before}, {kv} cache"
                yield measure(what, made, flops)

    def decodes() -> Iterator[gpu_kernels.Measured]:
        for kv in ("bfloat16", "int8"):
            batch = 2 if small else 32
            made = gpu_kernels.attention_calls(device, batch, context, heads, kv, "bfloat16", enough)
            yield measure(f"attention, {batch} x {context} tokens, {kv} cache", made)

    def experts() -> Iterator[gpu_kernels.Measured]:
        sizes, chosen = ((8, 64, 32), 3) if small else ((64, 2048, 1408), 6)
        for tokens in (1, 2) if small else (1, 8, 64):
            for what, made in gpu_dummy.expert_calls(dummy, sizes, tokens, chosen).items():
                yield measure(what, made)

    def latents() -> Iterator[gpu_kernels.Measured]:
        for batch in (1, 2) if small else (1, 32):
            made = gpu_dummy.latent_calls(dummy, batch, context, (2, 16, 8) if small else (16, 512, 64))
            yield measure(f"latent attention, {batch} x {context} tokens", made)

    def others() -> Iterator[gpu_kernels.Measured]:
        for tokens in (1, 4) if small else (1, 4096):
            for what, made in gpu_kernels.small_calls(device, tokens, n, "bfloat16").items():
                yield measure(what, made)

    def samplings() -> Iterator[gpu_kernels.Measured]:
        for rows in (1,) if small else (1, 16):
            for what, options in SAMPLING.items():
                made = gpu_kernels.sampling_calls(device, rows, vocab, *options)
                yield measure(f"sampling {rows}x{vocab}, {what}", made)

    return [prompts, decodes, experts, latents, others, samplings]


def decode_rows(device: CupyDevice, rate: float) -> Iterator[Callable[[], Iterable[Row]]]:
    """Whole decode steps, in graphs, of 1,024 tokens of context."""
    import cupy

    def of_shape(shape: gpu_decode.Shape, format: str, M: int) -> Iterator[Row]:
        step = gpu_decode.DecodeStep(CudaBackend(device), shape, format, M, 1024)
        seconds = replay_time(step.backend, step.record())
        yield gpu_decode.results_of(step, seconds, rate) | {"format": format}

    def of_model(model: Any, M: int) -> Iterator[Row]:
        dummy = gpu_dummy.DummyStep.build(gpu_dummy.DummyBackend(device), model, M, 1024)
        yield gpu_dummy.results_of(dummy, replay_time(dummy.backend, dummy.record()), rate) | {
            "format": "int4"
        }

    def served(M: int) -> Iterator[Row]:
        return gpu_engine.engine_rows(gpu_dummy.DummyBackend(device), gpu_dummy.LLAMA_8B, M)

    shapes = [
        (gpu_decode.LLAMA_8B, "int4", 1),
        (gpu_decode.LLAMA_8B, "float", 1),
        (gpu_decode.LLAMA_8B, "int4", 8),
    ]
    models = [(gpu_dummy.DEEPSEEK_V2_LITE, 1), (gpu_dummy.DEEPSEEK_V2_LITE, 16), (gpu_dummy.QWEN3_30B, 1)]
    for case in (*shapes, *models, (gpu_decode.QWEN_72B, "int4", 1)):
        yield lambda case=case: (of_shape if len(case) == 3 else of_model)(*case)  # type: ignore[misc,operator]
        cupy.get_default_memory_pool().free_all_blocks()
    for M in (1, 16):
        yield lambda M=M: served(M)  # type: ignore[misc]
        cupy.get_default_memory_pool().free_all_blocks()


def replay_time(backend: CudaBackend, graph: Any) -> float:
    """Seconds of a recorded step, which ends with the sampled ids on the host. Its kernels are compiled together before."""
    backend.prepare(lambda: [call() for call in graph.calls] and None, 1, lambda done: None)
    for _ in range(3):
        graph.replay()
    start = time.perf_counter()
    for _ in range(20):
        graph.replay()
    return (time.perf_counter() - start) / 20


def facts(device: CupyDevice, rate: float) -> Row:
    """What the figures were measured on, and what was not there."""
    versions = {}
    for name in SHOWN:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device.name,
        "compute_capability": device.arch / 10,
        "copy_gigabytes_per_second": rate / 1e9,
        "python": platform.python_version(),
        "packages": versions,
        "missing": [name for name in WANTED if importlib.util.find_spec(name) is None]
        + gpu_check.missing_tools(),
        "cublas": find_library(device.cuda) or "not found",
    }


def parts_of(stage: str, device: CupyDevice, rate: float) -> Iterable[Callable[[], Iterable[Row]]]:
    """What a stage measures, in parts that may fail each for itself."""
    time_of = timer(device)
    if stage == "facts":
        return [lambda: [facts(device, rate)]]
    assert stage in STAGES
    if stage == "products":
        sizes = rate, 8192, 256 << 20, TOKENS
        return prepared(device, lambda on, watch: gpu_products.product_speed(on, watch, *sizes))
    if stage == "kernels":
        return prepared(device, lambda on, watch: kernel_speed(on, watch, rate))
    if stage == "peers":
        return [lambda: gpu_peers.peer_speed(8192, TOKENS, rate)]
    if stage == "decode":
        return decode_rows(device, rate)
    library = open_library(device, device.cuda)
    if stage == "library":
        return gpu_products.side_by_side(device, library, time_of)
    return gpu_prompts.prompt_speed(device, library)


def main() -> None:
    if sys.argv[1:2] not in [[name] for name in STAGES]:
        raise SystemExit(f"one of {', '.join(STAGES)} expected")
    try:
        device = CupyDevice()
    except KernelError as error:
        print(error)
        raise SystemExit(gpu_check.NO_DEVICE) from None
    first = int(*sys.argv[2:3])
    raise SystemExit(keep(parts_of(sys.argv[1], device, copy_rate(device)), device.synchronize, first))


if __name__ == "__main__":
    main()
