"""The runner: StepPlan -> arrays -> decoder -> sampled ids. One per rank.

A step is launched, and collected later: on a device that computes beside the host a second one may be launched
meanwhile, whose tokens are then taken from the first one on the device. Steps that only decode are captured once
per batch size and replayed.

Shape legend: T tokens of the step, S rows to sample.
"""

from __future__ import annotations

from collections import deque
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.backend import Backend, Graph
from flm.worker.execution.drawing import Draw, Drawing
from flm.worker.execution.model import Decoder
from flm.worker.execution.sampling import SamplingRow
from flm.worker.execution.slot_state import SlotState
from flm.worker.execution.step_arrays import StepArrays
from flm.worker.plan import Scheduled, StepPlan, StepResult

Array = Any


class Runner:
    """Runs step plans on one rank. The leader (rank 0) returns a StepResult of each.

    ahead: how many steps may be launched beyond the one that is collected next. Where there are any, every rank samples,
    each the same ids, for the next step's tokens are known nowhere else."""

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
        ahead: int = 0,
    ) -> None:
        self.model, self.backend, self.leader, self.capture = model, backend, leader, capture
        self.block_size, self.max_context, self.ahead = block_size, max_context, ahead
        self.slots: dict[int, SlotState] = {}
        self._draws = leader or ahead > 0
        self._arrays = StepArrays(
            backend,
            model.shard.model.attention,
            block_size=block_size,
            max_context=max_context,
            max_sequences=max_sequences,
            max_tokens=max_tokens,
            adapters=bool(model.adapters),
        )
        self._drawing = Drawing(backend, max_sequences)
        self._graphs: dict[tuple[int, bool, bool], tuple[Graph, Array]] = {}  # by tokens, greedy, adapted
        self._sizes = backend.decode_sizes(max_sequences) if capture else ()
        self._flying: deque[Draw] = deque()  # launched and not collected, the oldest first
        self._last: Draw | None = None  # of the step that was launched last

    @property
    def in_flight(self) -> int:
        """Steps that were launched and not collected."""
        return len(self._flying)

    def rehearse(self, largest: bool = False) -> None:
        """Steps of padding alone, of every kind and of every size that the backend wants ready, so that every kernel is
        launched; `largest`: of the largest sizes, after which all that ops keep is allocated."""
        tokens, rows = self._arrays.tokens, self._arrays.rows
        sizes = self.backend.decode_sizes(rows)[-1 if largest else 0 :]
        self._arrays.pad(0, tokens)
        with self.model.comm.watched():
            self._arrays.push()
            for with_adapters in self._kinds():
                self._arrays.adapted = with_adapters
                for count in sorted({min(2 * rows + 1, tokens), tokens}):  # prompts
                    self._logits(count, min(rows, count), self._draws)
                for size in sizes:
                    logits_SV = self._logits(size, None, self._draws)
            if self._draws:
                self._drawing.rehearse(logits_SV)

    def _kinds(self) -> tuple[bool, ...]:
        """Of steps: without adapters, and with them where there are any."""
        return (False, True) if self.model.adapters else (False,)

    def capture_ahead(self) -> None:
        """Capture decode steps of every size that the backend wants ready, and run them."""
        self._arrays.pad(0, self._arrays.tokens)
        with self.model.comm.watched():
            self._arrays.push()
            for with_adapters, size, greedy in product(self._kinds(), self._sizes, (True, False)):
                self._arrays.adapted = with_adapters
                # ranks that do not sample take part in every replay all the same
                graph, _ = self._captured(size, greedy and self._draws)
                for _ in range(2):  # the first compiles, the second may be made into one launch
                    graph.replay()

    def run(self, plan: StepPlan) -> StepResult | None:
        """Carry out one plan, with none under way; a StepResult on the leader, None on the others."""
        assert not self._flying, "steps are under way"
        self.launch(plan)
        return self.collect()

    def launch(self, plan: StepPlan) -> None:
        """Give the device everything that the plan wants done. Plans come in order."""
        assert len(self._flying) <= self.ahead, f"step {plan.step} would be one too many under way"
        with self.model.comm.launching():
            self._apply(plan)
            items = [item for item in plan.scheduled if item.sample]
            rows = [self.slots[item.slot].row for item in items]
            greedy = self._draws and all(row.plain_greedy for row in rows)
            logits_SV = self._forward(plan, self._fill(plan.scheduled), len(items), greedy)
            found: list[Array] = []
            if items and self._draws:
                found = [self._drawing.ids_S[: len(items)]] if greedy else self._draw(items, rows, logits_SV)
            self._last = Draw(plan.step, items, rows, self.backend.fetch(found))
        self._flying.append(self._last)

    def awaits(self, plan: StepPlan) -> bool:
        """Whether launch() is going to wait for the step before, which drew tokens that penalties of this plan count."""
        if not self._flying:
            return False
        known = (self.slots.get(item.slot) for item in plan.scheduled if item.sample)
        return any(state is not None and state.row.counts is not None for state in known)

    def collect(self) -> StepResult | None:
        """Wait for the oldest step under way; a StepResult on the leader, None on the others."""
        draw = self._flying.popleft()
        with self.model.comm.awaiting():
            draw.wait()
        return StepResult(draw.step, draw.sampled()) if self.leader else None

    def _fill(self, scheduled: list[Scheduled]) -> int:
        return self._arrays.fill(scheduled, self.slots, self._last.row_of if self._last else {})

    def _draw(self, items: list[Scheduled], rows: list[SamplingRow], logits_SV: Array) -> list[Array]:
        """Draw by each row's parameters, when all the rest of the step is on its way."""
        for item, row in zip(items, rows, strict=True):
            length, state = item.num_computed + item.num_tokens, self.slots[item.slot]
            # penalties count every token: the one that was just drawn has to be read after all
            if row.counts is not None and state.count < length:
                assert self._last is not None
                # -1: logits that were not finite, which end the sequence; what is drawn for it now is thrown away
                state.foresee([max(self._last.token(item.slot), 0)])
            row.position = length
        return self._drawing.draw(logits_SV, rows)

    def all_logits(self, plan: StepPlan) -> NDArray[np.float32]:
        """float32 [T, vocab]: the logits of every token that the plan computes. None may be under way."""
        with self.model.comm.watched():
            return self._all_logits(plan)

    def _all_logits(self, plan: StepPlan) -> NDArray[np.float32]:
        self._apply(plan)
        tokens = self._fill(plan.scheduled)
        self._arrays.push()
        h_TE = self.model.hidden(self._arrays.inputs(tokens))
        step = self._arrays.rows
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
            if self._arrays.positions is not None:
                state.positions = self._arrays.positions.request(new.token_ids[: new.num_prompt])
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
        self._arrays.extend_table(slot, state.blocks, blocks)
        state.blocks += len(blocks)

    def _forward(self, plan: StepPlan, tokens: int, rows: int, greedy: bool) -> Array:
        """Logits [S or more, vocab] of the rows to sample, in the order of plan.scheduled; greedy: their ids too."""
        if tokens == len(plan.scheduled) == rows:  # each item one token, each sampled: a pure decode step
            return self._decode(tokens, greedy)
        self._arrays.choose_rows(plan.scheduled, rows)
        self._arrays.push(self._drawing.ids_S)
        if not self.capture:
            return self._logits(tokens, rows, greedy)
        # one program though it is used once: between single ops the other threads would fall asleep
        with self.backend.capture() as graph:
            logits_SV = self._logits(tokens, rows, greedy)
        graph.replay()
        return logits_SV

    def _logits(self, tokens: int, rows: int | None, greedy: bool) -> Array:
        """The ops of one step. rows None: every token is sampled."""
        h_TE = self.model.hidden(self._arrays.inputs(tokens))
        S = tokens if rows is None else rows
        if not S:
            return None
        logits_SV = self.model.logits(h_TE, None if rows is None else self._arrays.chosen_rows(rows))
        if greedy:
            self._drawing.greedy(logits_SV, S)
        return logits_SV

    def _decode(self, tokens: int, greedy: bool) -> Array:
        if not self.capture:
            self._arrays.push(self._drawing.ids_S)
            return self._logits(tokens, None, greedy)
        size = next((size for size in self._sizes if size >= tokens), tokens)
        if size > tokens:
            self._arrays.pad(tokens, size)
        self._arrays.push(self._drawing.ids_S)
        graph, logits_SV = self._captured(size, greedy)
        graph.replay()
        return logits_SV

    def _captured(self, tokens: int, greedy: bool) -> tuple[Graph, Array]:
        key = tokens, greedy, self._arrays.adapted
        if key not in self._graphs:
            with self.backend.capture() as graph:
                logits_SV = self._logits(tokens, None, greedy)
            self._graphs[key] = (graph, logits_SV)
        return self._graphs[key]
