"""The simulator of pipeline schedules against closed forms and steps by hand; prefetch plans are valid and worth it."""

import random
from itertools import pairwise

import pytest

from megatron_tgdpo.planning.pipeline_schedule import (
    BACKWARD,
    FORWARD,
    FROZEN,
    Compute,
    Post,
    StageCosts,
    Wait,
    execute,
    interleaved,
    one_f_one_b,
    policy_order,
    uniform,
)
from megatron_tgdpo.planning.prefetch import plan_prefetch, stage_hooks


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 8, 16])
def test_1f1b_takes_as_many_rounds_as_micro_batches_and_other_stages(stages: int, micro_batches: int) -> None:
    alone = one_f_one_b(uniform(stages, 1, 2), micro_batches)
    assert alone.step_time == (micro_batches + stages - 1) * 3
    assert alone.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))
    colocated = one_f_one_b(uniform(stages, 1, 2, frozen=2), micro_batches, colocated=True)
    assert colocated.step_time == (micro_batches + stages - 1) * 5


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 2), (2, 8), (3, 6), (4, 4), (4, 16), (8, 16)])
@pytest.mark.parametrize("chunks", [2, 4])
def test_chunks_divide_the_bubble(stages: int, micro_batches: int, chunks: int) -> None:
    timeline = interleaved(uniform(stages, 1, 2), micro_batches, chunks)
    assert timeline.step_time == pytest.approx(micro_batches * 3 + (stages - 1) * 3 / chunks)
    timeline = interleaved(uniform(stages, 1, 2, frozen=2), micro_batches, chunks, colocated=True)
    assert timeline.step_time == pytest.approx(micro_batches * 5 + (stages - 1) * 5 / chunks)


def test_a_step_by_hand() -> None:
    # Two stages, two micro batches; the second stage is twice as slow.
    timeline = one_f_one_b([StageCosts(1, 2), StageCosts(2, 4)], 2)
    first = [("forward", 0, 0, 1), ("forward", 1, 1, 2), ("backward", 0, 7, 9), ("backward", 1, 13, 15)]
    second = [("forward", 0, 1, 3), ("backward", 0, 3, 7), ("forward", 1, 7, 9), ("backward", 1, 9, 13)]
    for slots, expected in zip(timeline.stages, (first, second), strict=True):
        assert [(s.compute.kind, s.compute.micro_batch, s.start, s.end) for s in slots] == expected
    assert timeline.bubble == pytest.approx(3 / 15)
    # The hidden states of micro batch 1 wait for stage 1 to take them; each transfer on the critical path adds 0.5.
    assert one_f_one_b([StageCosts(1, 2, 0, 0.5), StageCosts(2, 4, 0, 0.5)], 2).step_time == 15 + 3 * 0.5


def test_a_slow_stage_is_fed_by_the_others() -> None:
    costs = [StageCosts(1, 2), StageCosts(1, 2), StageCosts(2, 5)]
    assert one_f_one_b(costs, 8).step_time == 8 * 7 + 2 * 3


def test_stages_that_wait_for_each_other_are_found() -> None:
    """The first sends a before it takes b, the second the other way round."""
    programs = [
        [Post((("a",),)), Wait((("a",),)), Post((("b",),)), Wait((("b",),)), Compute(FORWARD, 0, 1.0)],
        [Post((("b",),)), Wait((("b",),)), Post((("a",),)), Wait((("a",),)), Compute(FORWARD, 0, 1.0)],
    ]
    with pytest.raises(ValueError, match=r"stages \[0, 1\] wait for each other"):
        execute(programs, [0.0, 0.0], rendezvous=True)


def test_prefetch_by_hand() -> None:
    # Frozen passes fill all but the first forward: stage 1 has nothing to do before it.
    timeline = plan_prefetch(tuple(uniform(2, 1, 2, frozen=2)), 4, 4).timeline
    assert timeline.step_time == 4 * 5 + 1
    assert [slot.compute.kind for slot in timeline.stages[0]].count(FROZEN) == 4


@pytest.mark.parametrize(
    ("stages", "micro_batches", "least_gain"), [(2, 8, 0.08), (4, 8, 0.14), (4, 16, 0.08), (8, 32, 0.09)]
)
def test_prefetch_shortens_a_colocated_step(stages: int, micro_batches: int, least_gain: float) -> None:
    costs = tuple(uniform(stages, 1, 2, frozen=2))
    colocated = one_f_one_b(costs, micro_batches, colocated=True).step_time
    plan = plan_prefetch(costs, micro_batches, micro_batches)
    assert plan.timeline.step_time < (1 - least_gain) * colocated
    assert plan.timeline.step_time >= micro_batches * 5 + (stages - 1)


def test_plans_are_complete_whatever_the_costs() -> None:
    """Each is executed with synchronous exchanges when it is made, so one that could hang would raise here."""
    rng = random.Random(0)
    for _ in range(25):
        stages, micro_batches = rng.randint(2, 8), rng.randint(1, 20)
        frozen = max(1, micro_batches + rng.choice([-2, 0, 0, 0, 1, 3]))
        costs = tuple(
            StageCosts(rng.uniform(0.5, 2), rng.uniform(1, 4), rng.uniform(0.1, 4), rng.choice([0.0, 0.2]))
            for _ in range(stages)
        )
        plan = plan_prefetch(costs, micro_batches, frozen)
        if frozen == micro_batches:
            # At worst what a co-located step does, but for transfers of their own.
            colocated = one_f_one_b(costs, micro_batches, colocated=True).step_time
            assert plan.timeline.step_time <= colocated + 2 * (micro_batches + stages) * costs[0].transfer + 1e-9
        for stage, slots in enumerate(plan.timeline.stages):
            during_call, before_forward = stage_hooks(plan, stage)
            assert list(during_call) == sorted(during_call)
            assert len(before_forward) == micro_batches
            assert max(during_call[-1], before_forward[-1]) == frozen
            passes = [(slot.compute.kind, slot.compute.micro_batch) for slot in slots]
            assert [number for kind, number in passes if kind == FROZEN] == list(range(frozen))
            policy = [item for item in passes if item[0] != FROZEN]
            assert policy == policy_order(stages, stage, micro_batches)
            # Passes of a stage do not overlap, and every frozen one follows its own on the stage before.
            assert all(a.end <= b.start + 1e-9 for a, b in pairwise(slots))
            if stage:
                before = {
                    s.compute.micro_batch: s.end for s in plan.timeline.stages[stage - 1] if s.compute.kind == FROZEN
                }
                frozen_slots = [slot for slot in slots if slot.compute.kind == FROZEN]
                assert all(before[slot.compute.micro_batch] <= slot.start for slot in frozen_slots)


def test_a_stage_works_when_its_input_is_there() -> None:
    stages = one_f_one_b(uniform(2, 1, 2), 1).stages
    assert [[(slot.compute.kind, slot.start, slot.end) for slot in slots] for slots in stages] == [
        [(FORWARD, 0, 1), (BACKWARD, 4, 6)],
        [(FORWARD, 1, 2), (BACKWARD, 2, 4)],
    ]
