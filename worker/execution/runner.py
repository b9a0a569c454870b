"""The runner: StepPlan -> arrays -> decoder -> sampled ids. One per rank.

It keeps, for every slot, the tokens and the block table, in fixed arrays that the step's ops read. Steps that
only decode are captured once per batch size and replayed.

Shape legend: T tokens of the step, S rows to sample, B blocks per sequence, N top log-probabilities.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.backend import Backend, Graph, SamplingBatch
from flm.worker.execution.model import Decoder
from flm.worker.execution.sampling import build_batch
from flm.worker.execution.slot_state import SlotState
from flm.worker.execution.step_positions import step_positions
from flm.worker.layers.loading import StepInputs
from flm.worker.plan import Sampled, Scheduled, StepPlan, StepResult

Array = Any


class Runner:
    """Runs step plans on one rank. The leader (rank 0) also samples and returns a StepResult."""

    def __init__(
        self,
        model: Decoder,
        backend: Backend,
        *,
        block_size: int,
        max_context: int,
        max_sequences: int,
        max_tokens: int,
        leader: bool,
        capture: bool = True,
    ) -> None:
        self.model, self.backend, self.leader, self.capture = model, backend, leader, capture
        self.block_size, self.max_context = block_size, max_context
        self.slots: dict[int, SlotState] = {}
        blocks = -(-max_context // block_size)
        int32 = lambda *shape: np.zeros(shape, np.int32)
        self._tables_SB: NDArray[np.int32] = int32(max_sequences, blocks)
        self._ids_T, self._positions_T = int32(max_tokens), int32(max_tokens)
        self._slots_T, self._sequence_T = int32(max_tokens), int32(max_tokens)
        self._adapter_T = int32(max_tokens) - 1
        self._adapted = False  # whether a token of this step has an adapter
        self._rows_S = int32(max_sequences)
        self._sampled_S = backend.empty((max_sequences,), np.int32)
        self._graphs: dict[tuple[int, bool, bool], tuple[Graph, Array]] = {}  # by tokens, greedy, adapted
        self._sizes = backend.decode_sizes(max_sequences) if capture else ()
        self._positions = step_positions(model.shard.model.attention, max_tokens)
        self._staged = backend.staged(self._host_arrays(), self._tables_SB)

    def _host_arrays(self) -> dict[str, NDArray[Any]]:
        """What is filled before every step."""
        arrays: dict[str, NDArray[Any]] = {
            "ids": self._ids_T,
            "positions": self._positions_T,
            "slots": self._slots_T,
            "sequences": self._sequence_T,
            "rows": self._rows_S,
        }
        if self.model.adapters:
            arrays["adapters"] = self._adapter_T
        own = self._positions
        if own is not None:
            tables: dict[str, NDArray[Any] | None] = {
                "cos": own.cos_TR,
                "sin": own.sin_TR,
                "q_scale": own.q_scale_T,
                "rotary": own.rows_T,
                "visible": own.last_visible_T,
            }
            arrays |= {name: array for name, array in tables.items() if array is not None}
        return arrays

    def rehearse(self, largest: bool = False) -> None:
        """Steps of padding alone, of every kind and of every size that the backend wants ready, so that every kernel is
        launched; `largest`: of the largest sizes, after which all that ops keep is allocated."""
        tokens, rows = len(self._ids_T), len(self._rows_S)
        sizes = self.backend.decode_sizes(rows)[-1 if largest else 0 :]
        self._pad(0, tokens)
        with self.model.comm.watched():
            self._staged.push()
            for with_adapters in self._kinds():
                self._adapted = with_adapters
                for count in sorted({min(2 * rows + 1, tokens), tokens}):  # prompts
                    self._logits(count, min(rows, count), self.leader)
                for size in sizes:
                    logits_SV = self._logits(size, None, self.leader)
            if self.leader:
                self.backend.sample(
                    logits_SV, SamplingBatch.drawing(rows), self._sampled_S, self.backend.empty((rows,))
                )

    def _kinds(self) -> tuple[bool, ...]:
        """Of steps: without adapters, and with them where there are any."""
        return (False, True) if self.model.adapters else (False,)

    def capture_ahead(self) -> None:
        """Capture decode steps of every size that the backend wants ready, and run them."""
        self._pad(0, len(self._ids_T))
        with self.model.comm.watched():
            self._staged.push()
            for with_adapters, size, greedy in product(self._kinds(), self._sizes, (True, False)):
                self._adapted = with_adapters
                # followers never sample, but take part in every replay
                graph, _ = self._captured(size, greedy and self.leader)
                for _ in range(2):  # the first compiles, the second may be made into one launch
                    graph.replay()

    def run(self, plan: StepPlan) -> StepResult | None:
        """Carry out one plan; a StepResult on the leader, None on the others."""
        with self.model.comm.watched():
            return self._run(plan)

    def _run(self, plan: StepPlan) -> StepResult | None:
        self._apply(plan)
        tokens = self._fill(plan.scheduled)
        self._fill_adapters(plan.scheduled)
        items = [item for item in plan.scheduled if item.sample]
        greedy = self.leader and all(self.slots[item.slot].row.plain_greedy for item in items)
        logits_SV = self._forward(plan, tokens, len(items), greedy)
        if not self.leader:
            return None
        return StepResult(plan.step, self._drawn(items) if greedy else self._sample(items, logits_SV))

    def all_logits(self, plan: StepPlan) -> NDArray[np.float32]:
        """float32 [T, vocab]: the logits of every token that the plan computes."""
        with self.model.comm.watched():
            return self._all_logits(plan)

    def _all_logits(self, plan: StepPlan) -> NDArray[np.float32]:
        self._apply(plan)
        tokens = self._fill(plan.scheduled)
        self._fill_adapters(plan.scheduled)
        self._staged.push()
        h_TE = self.model.hidden(self._inputs(tokens))
        step = len(self._rows_S)
        parts = [
            self.backend.to_host(self.model.logits(h_TE[i : i + step], None)).copy()
            for i in range(0, tokens, step)
        ]
        return np.concatenate(parts)

    def _apply(self, plan: StepPlan) -> None:
        for slot in plan.finished:
            self.slots.pop(slot, None)
        for new in plan.new:
            name = new.params.adapter
            adapter = self.model.adapters.index(name) if name else -1
            self.slots[new.slot] = state = SlotState(new, self.max_context, adapter)
            if self._positions is not None:
                state.positions = self._positions.request(new.token_ids[: new.num_prompt])
            self._extend_table(new.slot, new.block_table)
        for item in plan.scheduled:
            if item.new_blocks:
                self._extend_table(item.slot, item.new_blocks)
            if item.new_tokens:
                self.slots[item.slot].append(item.new_tokens)
        if self.model.adapters:  # neighbours with one adapter share the reading of its factors
            plan.scheduled.sort(key=lambda item: (item.num_tokens > 1, self.slots[item.slot].adapter))

    def _extend_table(self, slot: int, blocks: list[int]) -> None:
        state = self.slots[slot]
        self._tables_SB[slot, state.blocks : state.blocks + len(blocks)] = blocks
        self._staged.note(slot * self._tables_SB.shape[1] + state.blocks, len(blocks))
        state.blocks += len(blocks)

    def _fill(self, scheduled: list[Scheduled]) -> int:
        """Write the step's ids, positions, cache slots and sequence numbers; returns T."""
        t = 0
        size = self.block_size
        for item in scheduled:
            slot, start, n = item.slot, item.num_computed, item.num_tokens
            self._ids_T[t : t + n] = self.slots[slot].tokens[start : start + n]
            self._sequence_T[t : t + n] = slot
            if n == 1:  # decodes are many and small: plain numbers cost a tenth of array operations
                self._positions_T[t] = start
                self._slots_T[t] = int(self._tables_SB[slot, start // size]) * size + start % size
            else:
                positions = self._positions_T[t : t + n] = np.arange(start, start + n)
                self._slots_T[t : t + n] = self._tables_SB[slot, positions // size] * size + positions % size
            if self._positions is not None:
                self._positions.write(t, self._positions_T[t : t + n], self.slots[item.slot].positions)
            t += n
        return t

    def _fill_adapters(self, scheduled: list[Scheduled]) -> None:
        """Write each token's adapter, where the model has any."""
        if not self.model.adapters:
            return
        t, self._adapted = 0, False
        for item in scheduled:
            adapter = self.slots[item.slot].adapter
            self._adapter_T[t : t + item.num_tokens] = adapter
            self._adapted |= adapter >= 0
            t += item.num_tokens

    def _inputs(self, tokens: int) -> StepInputs:
        arrays = self._staged.arrays
        first = lambda name: arrays[name][:tokens] if name in arrays else None
        positions_T, visible_T, rotary_T = first("positions"), first("visible"), first("rotary")
        return StepInputs(
            first("ids"),
            positions_T,
            first("slots"),
            first("sequences"),
            self._staged.table,
            positions_T if visible_T is None else visible_T,
            positions_T if rotary_T is None else rotary_T,
            first("cos"),
            first("sin"),
            first("q_scale"),
            first("adapters") if self._adapted else None,
        )

    def _forward(self, plan: StepPlan, tokens: int, rows: int, greedy: bool) -> Array:
        """Logits [S or more, vocab] of the rows to sample, in the order of plan.scheduled; greedy: their ids too."""
        if tokens == len(plan.scheduled) == rows:  # each item one token, each sampled: a pure decode step
            return self._decode(tokens, greedy)
        ends_S = np.cumsum([item.num_tokens for item in plan.scheduled])[[s.sample for s in plan.scheduled]]
        self._rows_S[:rows] = ends_S - 1
        self._staged.push()
        if not self.capture:
            return self._logits(tokens, rows, greedy)
        # one program though it is used once: between single ops the other threads would fall asleep
        with self.backend.capture() as graph:
            logits_SV = self._logits(tokens, rows, greedy)
        graph.replay()
        return logits_SV

    def _logits(self, tokens: int, rows: int | None, greedy: bool) -> Array:
        """The ops of one step. rows None: every token is sampled."""
        h_TE = self.model.hidden(self._inputs(tokens))
        S = tokens if rows is None else rows
        if not S:
            return None
        logits_SV = self.model.logits(h_TE, None if rows is None else self._staged.arrays["rows"][:rows])
        if greedy:
            self.backend.sample(logits_SV, SamplingBatch.greedy(S), self._sampled_S[:S], None)
        return logits_SV

    def _decode(self, tokens: int, greedy: bool) -> Array:
        if not self.capture:
            self._staged.push()
            return self._logits(tokens, None, greedy)
        size = next((size for size in self._sizes if size >= tokens), tokens)
        if size > tokens:
            self._pad(tokens, size)
        self._staged.push()
        graph, logits_SV = self._captured(size, greedy)
        graph.replay()
        return logits_SV

    def _pad(self, tokens: int, size: int) -> None:
        """Rows that store nothing and attend to nothing."""
        self._ids_T[tokens:size] = self._positions_T[tokens:size] = 0
        self._slots_T[tokens:size] = self._sequence_T[tokens:size] = self._adapter_T[tokens:size] = -1

    def _captured(self, tokens: int, greedy: bool) -> tuple[Graph, Array]:
        key = tokens, greedy, self._adapted
        if key not in self._graphs:
            with self.backend.capture() as graph:
                logits_SV = self._logits(tokens, None, greedy)
            self._graphs[key] = (graph, logits_SV)
        return self._graphs[key]

    def _sample(self, items: list[Scheduled], logits_SV: Array) -> list[Sampled]:
        """Draw one id a row from the logits."""
        rows = [self.slots[item.slot].row for item in items]
        S, tops = len(items), max(-1 if r.params.logprobs is None else r.params.logprobs for r in rows)
        backend, logprobs_S, top_ids_SN, top_SN = self.backend, None, None, None
        if tops >= 0:
            logprobs_S = backend.empty((S,), np.float32)
        if tops > 0:
            top_ids_SN, top_SN = backend.empty((S, tops), np.int32), backend.empty((S, tops), np.float32)
        backend.sample(logits_SV[:S], build_batch(rows), self._sampled_S[:S], logprobs_S, top_ids_SN, top_SN)
        sampled = self._drawn(items)
        if logprobs_S is not None:
            for out, logprob in zip(sampled, backend.to_host(logprobs_S).tolist(), strict=True):
                out.logprob = logprob
        if top_ids_SN is not None:
            ids_SN, values_SN = backend.to_host(top_ids_SN), backend.to_host(top_SN)
            for out, row, ids, values in zip(sampled, rows, ids_SN, values_SN, strict=True):
                k = row.params.logprobs or 0
                out.top = list(zip(ids[:k].tolist(), values[:k].tolist(), strict=True))
        return sampled

    def _drawn(self, items: list[Scheduled]) -> list[Sampled]:
        """The ids that the step's sampling left, without log-probabilities."""
        ids = self.backend.to_host(self._sampled_S[: len(items)]).tolist()
        return [Sampled(item.slot, token, 0.0) for item, token in zip(items, ids, strict=True)]
