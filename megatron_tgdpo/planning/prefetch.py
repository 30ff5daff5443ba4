"""When each stage runs the next step's frozen forward passes, so that they fill the bubbles of this step.

Frozen passes do not depend on the policy's weights, only on each other: a stage needs what the stage before computed of
the same micro batch. The plan is found by list scheduling with the policy first, backwards in time. Read backwards, a
step is a pipeline step too (backward passes flow down the stages, forward passes up). Running frozen passes as early as
possible there means as late as possible here: at the end of a step, where early stages wait for gradients and late
stages have none left. What does not fit in those bubbles runs one pass a round, between a backward and the forward
that follows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush

from megatron_tgdpo.planning.pipeline_schedule import (
    BACKWARD,
    FORWARD,
    StageCosts,
    Timeline,
    calls_before,
    one_f_one_b,
    policy_order,
)

# A frozen pass may start in a bubble that is this much of it too short; which is best depends on the costs.
_OVERHANGS = (0.0, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class PrefetchPlan:
    """A step of ``micro_batches`` that runs ``frozen`` frozen passes of the next.

    Attributes:
        micro_batches: Of this step.
        frozen: Micro batches of the next step.
        frozen_before: For each stage, how many frozen passes it runs before each of its policy passes, and after the
            last one: ``[stages][2 x micro_batches + 1]``.
        timeline: The step, with synchronous exchanges.
    """

    micro_batches: int
    frozen: int
    frozen_before: tuple[tuple[int, ...], ...]
    timeline: Timeline


@lru_cache(maxsize=64)
def plan_prefetch(costs: tuple[StageCosts, ...], micro_batches: int, frozen: int) -> PrefetchPlan:
    """The fastest plan found; a pure function, so every rank finds the same.

    Its timeline has been executed with synchronous exchanges (``pipeline_schedule.execute``), so no stage ever waits
    for one that waits for it.

    Args:
        costs: Of each stage; more than one.
        micro_batches: Of this step.
        frozen: Micro batches of the next step.
    """
    candidates = [_ListScheduler(costs, micro_batches, frozen, overhang).run() for overhang in _OVERHANGS]
    candidates.append(_with_forwards(len(costs), micro_batches, frozen))
    plans = [
        PrefetchPlan(micro_batches, frozen, counts, one_f_one_b(costs, micro_batches, frozen_before=counts))
        for counts in candidates
    ]
    return min(plans, key=lambda plan: plan.timeline.step_time)


def _with_forwards(stages: int, micro_batches: int, frozen: int) -> tuple[tuple[int, ...], ...]:
    """A frozen pass before each policy forward, as in a co-located step; too many start the step, too few end early."""
    counts = []
    for stage in range(stages):
        before = [0] * (2 * micro_batches + 1)
        before[0] = max(0, frozen - micro_batches)
        for position, (kind, micro_batch) in enumerate(policy_order(stages, stage, micro_batches)):
            if kind == FORWARD and micro_batch < frozen:
                before[position] += 1
        counts.append(tuple(before))
    return tuple(counts)


def stage_hooks(plan: PrefetchPlan, stage: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """When a stage runs frozen passes, by what a running schedule can tell.

    Returns:
        How many must be done in all while each exchange is on its way, and before each policy forward.

    Raises:
        ValueError: The plan has passes where there is neither.
    """
    counts = plan.frozen_before[stage]
    order = policy_order(len(plan.frozen_before), stage, plan.micro_batches)
    during_call: list[int] = []
    before_forward: list[int] = []
    due = 0
    for position, calls in enumerate(calls_before(len(plan.frozen_before), stage, order)):
        due += counts[position]
        is_forward = position < len(order) and order[position][0] == FORWARD
        if counts[position] and not calls and not is_forward:
            raise ValueError(f"stage {stage} cannot run frozen passes before its policy pass {position}")
        during_call += [due] * len(calls)
        if is_forward:
            before_forward.append(due)
    return tuple(during_call), tuple(before_forward)


class _ListScheduler:
    """One plan, made backwards: time runs from the end of the step; a pass is ready when its successors are done."""

    def __init__(self, costs: Sequence[StageCosts], micro_batches: int, frozen: int, overhang: float) -> None:
        self.costs = costs
        self.stages = len(costs)
        self.frozen = frozen
        self.overhang = overhang
        self.orders = [policy_order(self.stages, s, micro_batches)[::-1] for s in range(self.stages)]
        self.expected = self._without_frozen_passes(micro_batches)
        self.free = [0.0] * self.stages
        self.place = [0] * self.stages
        self.policy_done: dict[tuple[str, int, int], float] = {}
        self.frozen_done: list[list[float]] = [[] for _ in range(self.stages)]
        self.counts = [[0] * (len(order) + 1) for order in self.orders]
        # A round is a backward and the forward before it; each is owed one frozen pass.
        self.owed = [0] * self.stages
        self.events: list[tuple[float, int]] = []

    def _without_frozen_passes(self, micro_batches: int) -> list[list[float]]:
        """When each stage's passes end in plain 1F1B, counted from the end of the step and in reverse order."""
        timeline = one_f_one_b(self.costs, micro_batches)
        return [[timeline.step_time - slot.end for slot in reversed(slots)] for slots in timeline.stages]

    def run(self) -> tuple[tuple[int, ...], ...]:
        """``frozen_before`` of the plan."""
        self.events = [(0.0, stage) for stage in range(self.stages)]
        while self.events:
            now, stage = heappop(self.events)
            if now >= self.free[stage]:
                self._decide(now, stage)
        return tuple(tuple(counts[::-1]) for counts in self.counts)

    def _decide(self, now: float, stage: int) -> None:
        order, place = self.orders[stage], self.place[stage]
        waiting = self._frozen_is_ready(stage, now)
        if place == len(order):
            if waiting:
                self._run_frozen(now, stage)
            return
        ready = self._ready(stage, *order[place])
        if ready is not None and ready <= now:
            # Not between the backward and the forward of one micro batch: the last stage has nothing to wait for there.
            if waiting and self.owed[stage] > 0 and order[place][0] == BACKWARD:
                self.owed[stage] -= 1
                self._run_frozen(now, stage)
            else:
                self._run_policy(now, stage)
        elif waiting:
            frozen = self.costs[stage].frozen
            fits = now + (1 - self.overhang) * frozen <= max(self.expected[stage][place], ready or 0.0)
            if fits:
                self._run_frozen(now, stage)
            elif self.owed[stage] > 0:
                self.owed[stage] -= 1
                self._run_frozen(now, stage)

    def _ready(self, stage: int, kind: str, micro_batch: int) -> float | None:
        """When the pass's successor on another stage is done, its result's way included; None if not known yet."""
        if kind == BACKWARD:
            if stage == 0:
                return 0.0
            successor, cost = (BACKWARD, stage - 1, micro_batch), self.costs[stage]
        elif stage == self.stages - 1:
            successor, cost = (BACKWARD, stage, micro_batch), StageCosts(0.0, 0.0)
        else:
            successor, cost = (FORWARD, stage + 1, micro_batch), self.costs[stage]
        done = self.policy_done.get(successor)
        return None if done is None else done + cost.transfer

    def _frozen_is_ready(self, stage: int, now: float) -> bool:
        number = len(self.frozen_done[stage])
        if number == self.frozen or stage == self.stages - 1:
            return number < self.frozen
        after = self.frozen_done[stage + 1]
        return number < len(after) and after[number] + self.costs[stage].transfer <= now

    def _run_frozen(self, now: float, stage: int) -> None:
        end = now + self.costs[stage].frozen
        self.frozen_done[stage].append(end)
        self.counts[stage][self.place[stage]] += 1
        self._occupy(stage, end, stage - 1)

    def _run_policy(self, now: float, stage: int) -> None:
        kind, micro_batch = self.orders[stage][self.place[stage]]
        cost = self.costs[stage]
        end = now + (cost.forward if kind == FORWARD else cost.backward)
        self.policy_done[kind, stage, micro_batch] = end
        self.place[stage] += 1
        if kind == FORWARD:
            self.owed[stage] += 1
        self._occupy(stage, end, stage - 1 if kind == FORWARD else stage + 1)

    def _occupy(self, stage: int, end: float, neighbour: int) -> None:
        """Keeps the stage busy; it and the neighbour that may have waited for the result decide anew then."""
        self.free[stage] = end
        heappush(self.events, (end, stage))
        if 0 <= neighbour < self.stages:
            arrival = end + max(self.costs[stage].transfer, self.costs[neighbour].transfer)
            heappush(self.events, (arrival, neighbour))
