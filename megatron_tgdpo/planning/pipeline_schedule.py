"""Pipeline schedules on paper: when each stage computes and when it waits, for given costs.

Every stage runs a program: computations, and transfers to and from its neighbours that it posts and later waits for. A
transfer takes place when both sides have posted it, so a program that would hang on a synchronous network is found.
Times are in whatever unit the costs have.
"""

from collections.abc import Sequence
from dataclasses import dataclass

FORWARD, BACKWARD, FROZEN = "forward", "backward", "frozen"


@dataclass(frozen=True)
class StageCosts:
    """Of one micro batch on one stage.

    Attributes:
        forward: The policy's forward pass.
        backward: Its backward pass.
        frozen: Forward passes of reference and guide.
        transfer: Time to send hidden states, or their gradient, to a neighbour.
    """

    forward: float
    backward: float
    frozen: float = 0.0
    transfer: float = 0.0


@dataclass(frozen=True)
class Compute:
    """A computation: ``kind`` of one micro batch (and model chunk); ``frozen`` ones read what the stage before sent."""

    kind: str
    micro_batch: int
    duration: float
    chunk: int = 0


# What a transfer is of, and between which stages: of the policy (kind, stage before, micro batch).
Transfer = tuple[str | int, ...]


@dataclass(frozen=True)
class Post:
    """The stage is ready for these transfers; it goes on without waiting."""

    transfers: tuple[Transfer, ...]


@dataclass(frozen=True)
class Wait:
    """The stage waits until these transfers have taken place."""

    transfers: tuple[Transfer, ...]


Program = list[Compute | Post | Wait]


@dataclass(frozen=True)
class Slot:
    """A computation with its time."""

    compute: Compute
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What every stage computes, and when."""

    stages: tuple[tuple[Slot, ...], ...]

    @property
    def step_time(self) -> float:
        return max(slots[-1].end for slots in self.stages)

    @property
    def bubble(self) -> float:
        """The part of the step in which the busiest stage does not compute."""
        busiest = max(sum(slot.end - slot.start for slot in slots) for slots in self.stages)
        return 1 - busiest / self.step_time


def policy_order(stages: int, stage: int, micro_batches: int) -> list[tuple[str, int]]:
    """The order of a stage's policy passes under 1F1B: (kind, micro batch)."""
    warmup = min(stages - stage - 1, micro_batches)
    order = [(FORWARD, i) for i in range(warmup)]
    for i in range(micro_batches - warmup):
        order += [(FORWARD, warmup + i), (BACKWARD, i)]
    return order + [(BACKWARD, i) for i in range(micro_batches - warmup, micro_batches)]


def one_f_one_b(
    costs: Sequence[StageCosts],
    micro_batches: int,
    *,
    colocated: bool = False,
    frozen_before: Sequence[Sequence[int]] | None = None,
) -> Timeline:
    """The 1F1B schedule, with the exchanges of megatron-core's ``forward_backward_pipelining_without_interleaving``.

    Args:
        costs: Of each stage.
        micro_batches: Per step.
        colocated: Frozen passes run in the policy's forward.
        frozen_before: For each stage, how many frozen passes it runs before each of its policy passes, and after the
            last one: ``[stages][2 x micro_batches + 1]``. They read from a channel of their own, in order.

    Raises:
        ValueError: The stages would wait for each other.
    """
    programs = []
    for stage, cost in enumerate(costs):
        counts = frozen_before[stage] if frozen_before is not None else [0] * (2 * micro_batches + 1)
        forward = cost.forward + (cost.frozen if colocated else 0.0)
        programs.append(_one_f_one_b_program(len(costs), stage, micro_batches, cost, forward, counts))
    return execute(programs, [cost.transfer for cost in costs], rendezvous=True)


def _one_f_one_b_program(
    stages: int, stage: int, micro_batches: int, cost: StageCosts, forward: float, counts: Sequence[int]
) -> Program:
    order = policy_order(stages, stage, micro_batches)
    program: Program = []
    frozen = 0
    calls = calls_before(stages, stage, order)
    for position in range(len(order) + 1):
        runs = [Compute(FROZEN, frozen + i, cost.frozen) for i in range(counts[position])]
        frozen += len(runs)
        # Frozen passes run while the first exchange is on its way.
        for call in calls[position]:
            program += [Post(call), *runs, Wait(call)]
            runs = []
        program += runs
        if position < len(order):
            kind, micro_batch = order[position]
            program.append(Compute(kind, micro_batch, forward if kind == FORWARD else cost.backward))
    return program


def calls_before(stages: int, stage: int, order: list[tuple[str, int]]) -> list[list[tuple[Transfer, ...]]]:
    """The exchanges before each policy pass and after the last one; a transfer is (kind, stage before, micro batch)."""
    warmup = min(stages - stage - 1, len(order) // 2)
    calls = []
    for position in range(len(order) + 1):
        sent = _sent(order[position - 1], stage, stages) if position else ()
        received = _received(order[position], stage, stages) if position < len(order) else ()
        # In warm-up and cool-down, sending and receiving are calls of their own.
        separate = position <= warmup or position >= len(order) - warmup
        calls.append([call for call in ((sent, received) if separate else ((*sent, *received),)) if call])
    return calls


def _sent(done: tuple[str, int], stage: int, stages: int) -> tuple[Transfer, ...]:
    kind, micro_batch = done
    if kind == FORWARD:
        return ((FORWARD, stage, micro_batch),) if stage < stages - 1 else ()
    return ((BACKWARD, stage - 1, micro_batch),) if stage > 0 else ()


def _received(coming: tuple[str, int], stage: int, stages: int) -> tuple[Transfer, ...]:
    kind, micro_batch = coming
    if kind == FORWARD:
        return ((FORWARD, stage - 1, micro_batch),) if stage > 0 else ()
    return ((BACKWARD, stage, micro_batch),) if stage < stages - 1 else ()


def interleaved(costs: Sequence[StageCosts], micro_batches: int, chunks: int, *, colocated: bool = False) -> Timeline:
    """The interleaved schedule, in megatron-core's order; every chunk has an equal part of a stage.

    Sends are taken to be asynchronous, so with transfer times this is a lower bound.

    Args:
        costs: Of each stage, all its chunks together.
        micro_batches: Per step, a multiple of the stages.
        chunks: Model chunks of a stage.
        colocated: Frozen passes run in the policy's forward, chunk by chunk.
    """
    stages = len(costs)
    table = interleaved_order(stages, micro_batches, chunks)
    passes = [(FORWARD, chunk, i) for i, chunk in table], [(BACKWARD, chunks - 1 - chunk, i) for i, chunk in table]
    programs = []
    for stage, cost in enumerate(costs):
        forwards, backwards = passes
        warmup = min((stages - stage - 1) * 2 + (chunks - 1) * stages, len(table))
        order = forwards[:warmup]
        for forward, backward in zip(forwards[warmup:], backwards, strict=False):
            order += [forward, backward]
        order += backwards[len(table) - warmup :]
        takes = {FORWARD: cost.forward + (cost.frozen if colocated else 0.0), BACKWARD: cost.backward}
        program: Program = []
        for kind, chunk, i in order:
            # Virtual stages are counted through all chunks; a transfer is named by the earlier one.
            place, last = chunk * stages + stage, chunks * stages - 1
            before, after = (place - 1, place) if kind == FORWARD else (place, place - 1)
            if 0 <= before < last:
                program.append(Wait(((kind, before, i),)))
            program.append(Compute(kind, i, takes[kind] / chunks, chunk))
            if 0 <= after < last:
                program.append(Post(((kind, after, i),)))
        programs.append(program)
    return execute(programs, [cost.transfer for cost in costs], rendezvous=False)


def interleaved_order(stages: int, micro_batches: int, chunks: int) -> list[tuple[int, int]]:
    """megatron-core's order of (micro batch, chunk): of as many micro batches as stages one chunk after the other."""
    groups = (range(first, min(first + stages, micro_batches)) for first in range(0, micro_batches, stages))
    return [(i, chunk) for group in groups for chunk in range(chunks) for i in group]


def step_seconds(costs: Sequence[StageCosts], micro_batches: int, chunks: int = 1) -> float:
    """Of a co-located step: 1F1B, or with chunks the interleaved schedule.

    Once the pipeline is full, as many micro batches as stages take as long as those before them: more than three times
    as many are not simulated but counted.
    """
    stages = len(costs)

    def simulated(number: int) -> float:
        if chunks == 1:
            return one_f_one_b(costs, number, colocated=True).step_time
        return interleaved(costs, number, chunks, colocated=True).step_time

    if stages == 1:
        (cost,) = costs
        return micro_batches * (cost.forward + cost.backward + cost.frozen)
    rounds = micro_batches // stages - 3
    if rounds <= 0:
        return simulated(micro_batches)
    first = micro_batches - rounds * stages
    before, after = simulated(first - stages), simulated(first)
    return after + rounds * (after - before)


def execute(programs: Sequence[Program], transfer: Sequence[float], *, rendezvous: bool) -> Timeline:
    """Runs the programs of all stages against each other.

    Args:
        programs: Of each stage.
        transfer: Of each stage: how long what it posts takes on its way, for the slower of the two sides.
        rendezvous: A transfer needs both sides' posts; otherwise the sender's.

    Raises:
        ValueError: The stages wait for each other.
    """
    posted: dict[Transfer, list[float]] = {}
    frozen_ends: list[list[float]] = [[] for _ in programs]
    slots: list[list[Slot]] = [[] for _ in programs]
    clocks, places = [0.0] * len(programs), [0] * len(programs)

    def advance(stage: int) -> bool:
        """Does the stage's next action, if it can."""
        action = programs[stage][places[stage]]
        if isinstance(action, Post):
            for key in action.transfers:
                posted.setdefault(key, []).append(clocks[stage] + transfer[stage])
        elif isinstance(action, Wait):
            arrivals = [posted.get(key, []) for key in action.transfers]
            if any(len(times) < (2 if rendezvous else 1) for times in arrivals):
                return False
            clocks[stage] = max(clocks[stage], *(max(times) for times in arrivals))
        else:
            if action.kind == FROZEN and stage > 0:
                if len(frozen_ends[stage - 1]) <= action.micro_batch:
                    return False
                arrival = frozen_ends[stage - 1][action.micro_batch] + transfer[stage - 1]
                clocks[stage] = max(clocks[stage], arrival)
            slot = Slot(action, clocks[stage], clocks[stage] + action.duration)
            clocks[stage] = slot.end
            slots[stage].append(slot)
            if action.kind == FROZEN:
                frozen_ends[stage].append(slot.end)
        places[stage] += 1
        return True

    unfinished = set(range(len(programs)))
    while unfinished:
        moved = False
        for stage in sorted(unfinished):
            while stage in unfinished and advance(stage):
                moved = True
                if places[stage] == len(programs[stage]):
                    unfinished.discard(stage)
        if not moved:
            raise ValueError(f"stages {sorted(unfinished)} wait for each other")
    return Timeline(tuple(tuple(stage) for stage in slots))


def uniform(
    stages: int, forward: float, backward: float, frozen: float = 0.0, transfer: float = 0.0
) -> list[StageCosts]:
    """The same costs on every stage."""
    return [StageCosts(forward, backward, frozen, transfer)] * stages
