"""PyTorch's own products on the same GPU in the same run, where it is installed: int4 with groups of 128, and cuBLAS in
bfloat16. Nothing else of this project knows of PyTorch.

Shape legend: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from gpu_kernels import Measured, as_rows, copies_of, measure

Call = Callable[[], Any]
GROUP = 128


def peer_speed(size: int, tokens: tuple[int, ...], copy_rate: float) -> list[dict[str, Any]]:
    """Rows like those of our kernels, for N = K = size; none without PyTorch. copy_rate in bytes a second."""
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed: no figures to compare products with")
        return []
    torch = importlib.import_module("torch")
    results: list[Measured] = []
    for name, make in (("int4", int4_calls), ("bfloat16 (cuBLAS)", bfloat16_calls)):
        for m in tokens:
            what = f"torch {name} product {size}x{size}, {m} tokens"
            try:
                calls, nbytes = make(torch, size, size, m)
                flops = 2.0 * m * size * size
                results.append(measure(what, calls, nbytes, timer(torch), copy_rate, flops))
            except (RuntimeError, AttributeError) as error:  # not in this release, or not for this shape
                print(f"{what}: {error}")
            torch.cuda.empty_cache()
    return as_rows(results)


def int4_calls(torch: Any, n: int, k: int, m: int) -> tuple[list[Call], int]:
    """torch's int4 product, the one that its own quantised models use, and its bytes."""
    on = {"device": "cuda"}
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, **on)
    scales = torch.rand((k // GROUP, n, 2), dtype=torch.bfloat16, **on) / k
    weights = copies_of(lambda: torch.ops.aten._convert_weight_to_int4pack(codes, 8), n * k // 2)
    x = torch.randn((m, k), dtype=torch.bfloat16, **on)
    product = torch.ops.aten._weight_int4pack_mm
    nbytes = n * k // 2 + 4 * n * k // GROUP + 2 * m * (n + k)
    return [lambda w=w: product(x, w, GROUP, scales) for w in weights], nbytes  # type: ignore[misc]


def bfloat16_calls(torch: Any, n: int, k: int, m: int) -> tuple[list[Call], int]:
    """cuBLAS, and its bytes."""
    make = lambda rows: torch.randn((rows, k), dtype=torch.bfloat16, device="cuda")
    weights, x = copies_of(lambda: make(n), 2 * n * k), make(m)
    out = torch.empty((m, n), dtype=torch.bfloat16, device="cuda")
    calls = [lambda w=w: torch.matmul(x, w.T, out=out) for w in weights]  # type: ignore[misc]
    return calls, 2 * n * k + 2 * m * (n + k)


def timer(torch: Any) -> Callable[[list[Call]], float]:
    """Seconds of a call, as gpu_check.py times ours: many in one graph, by the device's clock."""

    def time_of(calls: list[Call]) -> float:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for call in calls[:3]:
                call()
        torch.cuda.synchronize()
        rounds, graph = max(1, 64 // len(calls)), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(rounds):
                for call in calls:
                    call()
        graph.replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / (rounds * len(calls))

    return time_of
