"""Continuous batching: which sequences compute how many tokens in the next step.

Pure: no I/O, no threads, no clock of its own. Each step spends at most `max_step_tokens` tokens, first on
sequences that decode (one token each), then on prompt chunks. Order is by priority, then by arrival.

A sequence takes blocks for all its known tokens when it starts, so only decoding ever needs more. Where the
pool has none left, the newest sequence of the lowest priority is preempted: it gives up its blocks and computes
its tokens again later (most of them are still in the prefix cache). The sequence that goes first can preempt all
others and no sequence may outgrow the pool, so every step makes progress.

A step may be planned while others are under way (flight.py): sequences are then assumed to go on, and the token
that one computes may be known to the ranks' devices alone. A plan that assumed too much computes a token for
nobody, which is thrown away. Blocks and slots of a sequence that has ended are free at once even so: every
device carries plans out in their order, so whatever such a token writes is written before anything that a later
plan puts there.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from operator import attrgetter

from flm.worker.errors import InvalidRequest, Overloaded
from flm.worker.limits import NO_RULES, Limits, Load, PromptRules, ServiceTime
from flm.worker.plan import NewSequence, Scheduled, StepPlan, StepResult
from flm.worker.request import FinishReason, Request, Timings, TokenEvent
from flm.worker.scheduling.blocks import BlockPool, BlockTable
from flm.worker.scheduling.flight import Flight
from flm.worker.scheduling.sequence import Sequence

_precedence = attrgetter("precedence")


class Scheduler:
    """The leader's state of all live requests. schedule() may be called again before postprocess() was, up to `ahead`
    times; results come in the order of their plans. add() and cancel() may come at any point in between, from the same
    thread."""

    def __init__(
        self,
        pool: BlockPool,
        limits: Limits,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        rules: PromptRules = NO_RULES,
        ahead: int = 0,
    ) -> None:
        self.limits, self.pool, self._rules, self.ahead = limits, pool, rules, ahead
        self._eos, self._vocab_size = frozenset(eos_token_ids), vocab_size
        self._live: dict[str, Sequence] = {}
        self._running: list[Sequence] = []  # both in order of precedence
        self._waiting: list[Sequence] = []
        self._by_slot: dict[int, Sequence] = {}
        self._free_slots = list(range(limits.max_sequences - 1, -1, -1))
        self._retired: list[int] = []  # slots that the ranks have not been told to forget yet
        self._flights: deque[Flight] = deque()  # steps without a result, the oldest first
        self._step = self._arrivals = 0
        self._service_time = ServiceTime()
        self._prefix_queries = self._prefix_hits = self._tokens_generated = self._preemptions = 0

    @property
    def context_limit(self) -> int:
        """Tokens that one request may have, prompt and output: max_context, or less where the pool is small."""
        return min(self.limits.max_context, self.pool.num_blocks * self.pool.block_size)

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def load(self) -> Load:
        """Reads only; walks over all live requests, so call it per heartbeat rather than per step."""
        return Load(
            running=len(self._running),
            waiting=len(self._waiting),
            outstanding_tokens=sum(s.outstanding for s in tuple(self._live.values())),
            blocks_total=self.pool.num_blocks,
            blocks_free=self.pool.free,
            blocks_cached=self.pool.cached,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            tokens_generated=self._tokens_generated,
            preemptions=self._preemptions,
        )

    def check(self) -> None:
        """AssertionError unless every block and every slot is accounted for."""
        self.pool.check([s.table for s in self._live.values()])
        assert len(self._running) + len(self._waiting) == len(self._live), "a request is lost"
        assert {s.slot: s for s in self._running} == self._by_slot, "slots and running sequences disagree"
        slots = sorted([*self._by_slot, *self._free_slots])
        assert slots == list(range(self.limits.max_sequences)), f"slots leaked or doubled: {slots}"

    # ------------------------------------------------------------------------------------ requests

    def add(self, request: Request, now: float) -> None:
        """Queue a request. InvalidRequest, AdapterNotFound where it can never run here, Overloaded in a full queue."""
        if request.request_id in self._live:
            raise InvalidRequest("request_id", f"{request.request_id!r} is already running")
        self.limits.check(request, self._vocab_size, self.context_limit)
        beyond = len(self._live) - self.limits.max_sequences  # requests that cannot run at once
        if beyond >= self.limits.max_queue:
            raise Overloaded(
                f"{len(self._running)} requests run and {len(self._waiting)} wait; the queue holds "
                f"{self.limits.max_queue}",
                self._service_time.until_one_ends(len(self._running)),
            )
        self._arrivals += 1
        sequence = Sequence(
            request,
            [*request.prompt_ids, *request.resumed_ids],
            BlockTable(
                self.pool,
                request.cache_salt,
                request.params.adapter,
                self._rules.cache_key(request.prompt_ids),
            ),
            precedence=(-request.priority, self._arrivals),
            arrived=now,
            max_length=min(len(request.prompt_ids) + request.params.max_tokens, self.context_limit),
            num_prompt=len(request.prompt_ids),
            uncut=self._rules.uncut(request.prompt_ids),
        )
        self._live[request.request_id] = sequence
        insort(self._waiting, sequence, key=_precedence)

    def cancel(self, request_id: str, now: float) -> TokenEvent | None:
        """End a request and free its blocks; its last event, or None where there is no such request (any more).
        A step in flight may still compute for it: the result is dropped."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return None
        self._remove(sequence)
        return sequence.last_event(FinishReason.CANCELLED, sequence.timings(now))

    def fail_all(self, error: BaseException | str) -> list[TokenEvent]:
        """End every request with ERROR and `error`'s text, and forget the cache: the ranks are gone."""
        sequences = list(self._live.values())
        for sequence in sequences:
            self._remove(sequence)
        self.pool.forget()
        self._flights.clear()
        return [s.last_event(FinishReason.ERROR, Timings(), error=str(error)) for s in sequences]

    # ------------------------------------------------------------------------------------ schedule

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None where there is nothing to do, or nothing before the result of a step under way."""
        assert len(self._flights) <= self.ahead, f"step {self._step} was not postprocessed"
        if not self._live:
            return None
        new: list[NewSequence] = []
        single, budget = self._schedule_decodes(self.limits.max_step_tokens)
        chunks: list[Scheduled] = []
        prefilling = [s for s in self._running if s.num_remaining > 1]
        while budget > 0:
            sequence = self._start(new, prefilling, now) or (prefilling.pop(0) if prefilling else None)
            if sequence is None:
                break
            work = self._chunk(sequence, budget)
            if work is None:
                break
            budget -= work.num_tokens
            (single if work.num_tokens == 1 else chunks).append(work)
        if not (single or chunks):
            assert self._flights, "live requests but no progress"
            return None
        self._step += 1
        finished, self._retired = self._retired, []
        plan = StepPlan(self._step, new, single + chunks, finished)
        self._flights.append(Flight(plan, [self._by_slot[item.slot] for item in plan.scheduled]))
        return plan

    def _schedule_decodes(self, budget: int) -> tuple[list[Scheduled], int]:
        """One token for each sequence that has one token to compute, and the budget that is left."""
        single: list[Scheduled] = []
        for sequence in tuple(self._running):
            # A negative slot was preempted for one before it, and so was everything after it.
            if budget == 0 or sequence.slot < 0:
                break
            length = sequence.length
            if length - sequence.num_computed != 1 or length >= sequence.max_length:
                continue  # it prefills, or ends with the step under way
            blocks = self._grow(sequence, length)
            if blocks is None:
                continue
            new_tokens = sequence.token_ids[sequence.num_sent :]
            sequence.num_sent += len(new_tokens)
            single.append(Scheduled(sequence.slot, length - 1, 1, blocks, new_tokens))
            budget -= 1
        return single, budget

    def _grow(self, sequence: Sequence, length: int) -> list[int] | None:
        """Room for `length` tokens, at the cost of sequences that come after; None: it has to wait a step."""
        while (blocks := sequence.table.grow(length)) is None:
            last = self._running[-1]
            if last is sequence:
                return None
            self._preempt(last)
        return blocks

    def _chunk(self, sequence: Sequence, budget: int) -> Scheduled | None:
        """As much of a prompt as the budget allows; its blocks were taken when it started. None: it must not be cut there."""
        remaining = sequence.num_remaining
        tokens = min(remaining, budget)
        if sequence.num_computed + tokens < sequence.uncut:
            return None
        return Scheduled(sequence.slot, sequence.num_computed, tokens, sample=tokens == remaining)

    def _start(self, new: list[NewSequence], prefilling: list[Sequence], now: float) -> Sequence | None:
        """Start the first waiting sequence if it goes before all that prefill and there is room for it."""
        if not self._waiting or len(self._running) >= self.limits.max_sequences:
            return None
        sequence = self._waiting[0]
        if prefilling and prefilling[0].precedence < sequence.precedence:
            return None
        if sequence.in_flight:  # preempted: the token that was drawn for it is not known yet
            return None
        # One spare block for each running sequence: else it would soon be preempted again.
        computed = sequence.table.open(sequence.token_ids, spare=len(self._running))
        if computed is None:
            return None
        del self._waiting[0]
        insort(self._running, sequence, key=_precedence)
        sequence.slot = self._free_slots.pop()
        self._by_slot[sequence.slot] = sequence
        sequence.num_computed = computed
        sequence.num_sent = len(sequence.token_ids)
        if sequence.started is None:
            sequence.started = now
            sequence.num_cached = min(computed, sequence.num_prompt)
            self._prefix_queries += sequence.num_sent
            self._prefix_hits += computed
        new.append(
            NewSequence(
                sequence.slot,
                list(sequence.token_ids),
                sequence.num_prompt,
                computed,
                list(sequence.table.blocks),
                sequence.request.params,
            )
        )
        return sequence

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        insort(self._waiting, sequence, key=_precedence)
        self._preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        """Out of the running ones: blocks and slot are free again. The next plan names the slot in
        `finished`, which ranks apply first, so the same plan may already give it to another sequence."""
        self._running.remove(sequence)
        sequence.table.release()
        sequence.num_computed = 0
        del self._by_slot[sequence.slot]
        self._retired.append(sequence.slot)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def _remove(self, sequence: Sequence) -> None:
        del self._live[sequence.request.request_id]
        if sequence.slot < 0:
            self._waiting.remove(sequence)
        else:
            self._leave(sequence)

    # --------------------------------------------------------------------------------- postprocess

    def postprocess(self, plan: StepPlan, result: StepResult, now: float) -> list[TokenEvent]:
        """Take in what the ranks drew in the oldest step under way: one event for each request that got a token or
        ended."""
        assert self._flights, f"step {plan.step} is not in flight"
        flight = self._flights.popleft()
        assert plan is flight.plan, f"step {plan.step} is not in flight, or not the oldest"
        assert result.step == plan.step, f"result of step {result.step} for step {plan.step}"
        drawn = {sampled.slot: sampled for sampled in result.sampled}
        events: list[TokenEvent] = []
        for item, sequence in flight.land():
            if self._live.get(sequence.request.request_id) is not sequence:
                continue  # ended, or cancelled during the step
            if self._rules.shares_prefixes and sequence.slot >= 0:
                sequence.table.publish(sequence.token_ids, item.num_computed + item.num_tokens)
            if item.sample:
                events.append(event := sequence.append(drawn[item.slot], self._eos, now))
                self._tokens_generated += drawn[item.slot].token_id >= 0
                if event.finish_reason is not None:
                    self._remove(sequence)
                    self._service_time.add(event.timings.prefill + event.timings.decode)
        return events
