"""Mixtures of experts on a GPU. Shape legend: see flm.kernels.expert_ops; P pairs of a token and one of its choices."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from flm.kernels.cuda.check import ACTIVATIONS, Array, check, dimensions
from flm.kernels.cuda.elementwise import THREADS, width
from flm.kernels.cuda.grouped import (
    FEW,
    CudaGroup,
    HostArrays,
    Pairs,
    interleaved,
    make_plan,
    pack_group,
    plan_size,
    product,
)
from flm.kernels.cuda.kernel import Device, Kernel, instance
from flm.kernels.cuda.op_calls import OpCalls
from flm.kernels.cuda.pack import NUMBERS, CudaMatrix, pack
from flm.kernels.errors import ShapeError
from flm.kernels.expert_ops import Routing
from flm.kernels.quant import QuantizedMatrix

MOST_TOKENS = (
    1024  # that go through the experts at once; more go piece by piece, so that results in between stay small
)
ROUTED = 4  # tokens of a block
AT_ONCE, SUMMED = 4, 16  # tokens, and choices of each, that one kernel multiplies and sums up
MOST_CHOICES, MOST_GROUPS, MOST_EXPERTS = 32, 32, 512


@dataclass(frozen=True, eq=False)
class CudaExperts:
    """Experts first, first + 1, …"""

    gate_up: CudaGroup
    down: CudaGroup
    first: int

    @property
    def count(self) -> int:
        return self.down.count

    @property
    def hidden(self) -> int:
        return self.down.shape[1]

    @property
    def width(self) -> int:
        return self.down.shape[2]

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes


def route_kernel(logits: str, experts: int) -> Kernel:
    """The instance for this dtype and so many experts."""
    each = next(v for v in (1, 2, 4, 8, 16) if 32 * v >= experts)
    return instance("route.cu", "route", logits, each)


def route(
    device: Device,
    logits_TN: Array,
    routing: Routing,
    bias_N: Array | None,
    ids_TK: Array,
    weights_TK: Array,
    counts_N: Array | None = None,
    seq_index_T: Array | None = None,
) -> None:
    """See expert_ops.py. logits: float32, float16 or bfloat16."""
    (T, N), K, r = dimensions("logits", logits_TN, 2), routing.top_k, routing
    if N > MOST_EXPERTS or K > MOST_CHOICES or r.groups > MOST_GROUPS:
        raise ShapeError(
            f"at most {MOST_EXPERTS} experts, {MOST_CHOICES} of them a token, in {MOST_GROUPS} groups expected, "
            f"got {N}, {K}, {r.groups}"
        )
    logits = check("logits", logits_TN, (T, r.experts), "float32", *ACTIVATIONS)
    lead = dimensions("ids", ids_TK, 2)[1]
    if lead < K:
        raise ShapeError(f"ids of at least {K} columns expected, got {lead}")
    check("ids", ids_TK, (T, lead), "int32")
    check("weights", weights_TK, (T, lead), "float32")
    for name, array, shape, kind in (
        ("bias", bias_N, (N,), "float32"),
        ("counts", counts_N, (N,), "int64"),
        ("seq_index", seq_index_T, (T,), "int32"),
    ):
        if array is not None:
            check(name, array, shape, kind)
    if T:
        args = [logits_TN, bias_N, seq_index_T, ids_TK, weights_TK, counts_N, T, N, K, lead]
        args += [int(r.score == "sigmoid"), r.groups, r.groups_kept, int(r.pair_score), int(r.normalize)]
        device.launch(route_kernel(logits, N), (-(-T // ROUTED),), 32 * ROUTED, [*args, float(r.scale)])


def combine_kernel(activation: str, E: int) -> Kernel:
    """The instance for this dtype and width."""
    return instance("combine_experts.cu", "combine_experts", activation, width(E))


def combine(
    device: Device,
    parts_PE: Array,
    experts: CudaExperts,
    ids_TK: Array,
    weights_TK: Array,
    out_TE: Array,
    accumulate: bool,
) -> None:
    """out[t] (+)= the sum over k of weights[t, k] * parts[t * K + k], in order, of experts that are here."""
    (T, E), K = dimensions("out", out_TE, 2), dimensions("ids", ids_TK, 2)[1]
    activation = check("out", out_TE, (T, E), *ACTIVATIONS)
    check("parts", parts_PE, (T * K, E), "float32")
    check("weights", weights_TK, (T, K), "float32")
    args = [parts_PE, ids_TK, weights_TK, out_TE, K, E, experts.first, experts.count, int(accumulate)]
    device.launch(combine_kernel(activation, E), (T, -(-E // (THREADS * width(E)))), THREADS, args)


def down_kernel(down: CudaGroup) -> Kernel:
    """The instance for these matrices."""
    m, number = down.first, NUMBERS[down.first.format]
    return instance("expert_down.cu", "expert_down", m.dtype, number, down.scale_type, m.group)


def down_and_combine(
    device: Device,
    act_PF: Array,
    experts: CudaExperts,
    ids_TK: Array,
    weights_TK: Array,
    out_TE: Array,
    accumulate: bool,
) -> None:
    """out[t] (+)= the sum over k of weights[t, k] * down(act[t * K + k]): what combine() gives, without results in between.
    Weights are read once a token, so for few tokens."""
    (T, E), K, down = dimensions("out", out_TE, 2), dimensions("ids", ids_TK, 2)[1], experts.down
    check("out", out_TE, (T, E), down.first.dtype)
    check("act", act_PF, (T * K, lead := int(act_PF.shape[1])), down.first.dtype)
    check("weights", weights_TK, (T, K), "float32")
    args = [act_PF, down.first.codes, down.first.scales, ids_TK, weights_TK, out_TE, K, E, experts.width]
    args += [lead, experts.first, experts.count, down.row_tiles, down.k_tiles, down.first.span]
    device.launch(down_kernel(down), (down.row_tiles, T), THREADS, [*args, int(accumulate)])


def scale_kernel(gate: str, activation: str, E: int, each: bool) -> Kernel:
    """The instance for these dtypes and this width; each: a gate for every element."""
    return instance("sigmoid_scale.cu", "sigmoid_scale", gate, activation, width(E), each)


def sigmoid_scale(device: Device, gate: Array, x_TE: Array) -> None:
    """x *= sigmoid(gate), in place. gate [T, 1], or [T, E] for each element its own."""
    T, E = dimensions("x", x_TE, 2)
    activation = check("x", x_TE, (T, E), *ACTIVATIONS)
    each = dimensions("gate", gate, 2)[1] == E != 1
    kind = check("gate", gate, (T, E if each else 1), "float32", *ACTIVATIONS)
    if T and E:
        grid = (T, -(-E // (THREADS * width(E))))
        device.launch(scale_kernel(kind, activation, E, each), grid, THREADS, [gate, x_TE, E])


class ExpertCalls(OpCalls):
    """The part of CudaBackend that flm.kernels.expert_ops describes."""

    merges_shared = True  # three launches fewer, and more weights under way at once

    def pack_experts(
        self, experts: Iterable[tuple[QuantizedMatrix, QuantizedMatrix]], first: int = 0
    ) -> CudaExperts:
        packed: list[tuple[CudaMatrix, CudaMatrix]] = []
        todo, threads = enumerate(experts, first), min(8, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(threads) as pool:
            while some := list(islice(todo, threads)):  # as many are held unpacked
                packed += pool.map(self._packed, some)
        if not packed:
            raise ShapeError("at least one expert expected, got none")
        gate_ups, downs = zip(*packed, strict=True)
        hidden, width = downs[0].shape
        for number, down in enumerate(downs, first):
            if down.shape != (hidden, width):
                raise ShapeError(f"expert {number}: down {(hidden, width)} expected, got {down.shape}")
        up = pack_group(gate_ups, self.device, width, gated=True)
        return CudaExperts(up, pack_group(downs, self.device, hidden), first)

    def _packed(
        self, numbered: tuple[int, tuple[QuantizedMatrix, QuantizedMatrix]]
    ) -> tuple[CudaMatrix, CudaMatrix]:
        """One expert's matrices, on the host."""
        number, (gate_up, down) = numbered
        if gate_up.shape != (2 * down.shape[1], down.shape[0]):
            want = (2 * down.shape[1], down.shape[0])
            raise ShapeError(f"expert {number}: {want} and {down.shape} expected, got {gate_up.shape}")
        host: Any = HostArrays()
        return pack(interleaved(gate_up), self.activation, host), pack(down, self.activation, host)

    def route(
        self,
        logits_TN: Array,
        routing: Routing,
        bias_N: Array | None,
        ids_TK: Array,
        weights_TK: Array,
        counts_N: Array | None = None,
        seq_index_T: Array | None = None,
    ) -> None:
        sequences = None if seq_index_T is None else self._on_device(seq_index_T)
        arrays = (logits_TN, routing, bias_N, ids_TK, weights_TK, counts_N, sequences)
        self.in_order(lambda: route(self.device, *arrays))

    def expert_mlp(
        self,
        x_TE: Array,
        experts: CudaExperts,
        ids_TK: Array,
        weights_TK: Array,
        out_TE: Array,
        accumulate: bool = False,
    ) -> None:
        T, K = dimensions("ids", ids_TK, 2)
        check("x", x_TE, (T, experts.hidden), self.activation)
        check("ids", ids_TK, (T, K), "int32")
        for start in range(0, T, MOST_TOKENS):
            part = slice(start, min(start + MOST_TOKENS, T))
            self._some(x_TE[part], experts, ids_TK[part], weights_TK[part], out_TE[part], accumulate)

    def _some(
        self,
        x_TE: Array,
        experts: CudaExperts,
        ids_TK: Array,
        weights_TK: Array,
        out_TE: Array,
        accumulate: bool,
    ) -> None:
        (T, E), K = x_TE.shape, ids_TK.shape[1]
        act_PF = self._area("expert act", T * K, -(-experts.width // 8) * 8, self.activation)
        up = Pairs(T * K, T, K, ids_TK, experts.first)
        if T > FEW:
            size = plan_size(T * K, experts.count)
            up = replace(up, plan=self._area("expert plan", 1, size, np.int32)[0])
            self.in_order(lambda: make_plan(self.device, up, experts.count))
        self.in_order(lambda: product(self.device, x_TE, experts.gate_up, act_PF, up))
        if T <= AT_ONCE and K <= SUMMED:
            arrays = (act_PF, experts, ids_TK, weights_TK, out_TE, accumulate)
            return self.in_order(lambda: down_and_combine(self.device, *arrays))
        down, parts_PE = replace(up, divide=1), self._area("expert parts", T * K, E, np.float32)
        self.in_order(lambda: product(self.device, act_PF, experts.down, parts_PE, down))
        self.in_order(lambda: combine(self.device, parts_PE, experts, ids_TK, weights_TK, out_TE, accumulate))

    def sigmoid_scale(self, gate_T1: Array, x_TE: Array) -> None:
        self.in_order(lambda: sigmoid_scale(self.device, gate_T1, x_TE))
