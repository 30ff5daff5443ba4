"""Where the time of one step goes: a profile of it, by groups of operators that add up to the step."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tools.benchmarks.training_step.operators import GROUPS, IDLE, PYTHON, STEP, group_of
from tools.benchmarks.training_step.recorder import Recorder


@dataclass
class ProfilingRecorder(Recorder):
    """Profiles the step after the warm-up.

    Attributes:
        profiler: Its events, once the steps are made.
    """

    profiler: Any = None
    _range: Any = field(default=None, repr=False)

    def begin(self) -> None:
        if len(self.losses) == 1:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self.profiler = profile(activities=activities, record_shapes=True)
            self.profiler.start()
            self._range = record_function(STEP)
            self._range.__enter__()
        super().begin()

    def end(self, loss: float) -> None:
        super().end(loss)
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
            self.profiler.stop()


@dataclass(frozen=True)
class OperatorTime:
    """Time that an operator spends in itself, at one place and with one kind of shapes.

    Attributes:
        group: Of ``operators.GROUPS``, or what is left.
        name: The operator.
        shapes: Of its inputs.
        seconds: On the device.
        calls: How many.
    """

    group: str
    name: str
    shapes: str
    seconds: float
    calls: int


def step_operators(events: Any, device: torch.device) -> list[OperatorTime]:
    """The step's time by operator, largest first; the seconds add up to the step.

    On a CPU every moment of the step belongs to the innermost operator that runs on the step's thread; what belongs to
    none is Python. On a GPU an operator has the time of the kernels that it launched; while no kernel runs, it is idle.

    Args:
        events: Of the profiler, in which one range is named ``operators.STEP``.
        device: Where the step ran.
    """
    (step,) = [event for event in events if event.name == STEP and event.device_type == torch.autograd.DeviceType.CPU]
    times: dict[tuple[str, str, str], list[float]] = {}

    def add(group: str, name: str, shapes: str, microseconds: float) -> None:
        entry = times.setdefault((group, name, shapes), [0.0, 0])
        entry[0] += microseconds / 1e6
        entry[1] += 1

    if device.type == "cuda":
        busy = 0.0
        for event in events:
            # A range appears among its own kernels, from its first kernel to its last.
            own = sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)
            if own > 0:
                busy += own
                add(_device_group(event), event.name, str(event.input_shapes), own)
        add(IDLE, IDLE, "", step.time_range.elapsed_us() - busy)
    else:
        for event in _inside(step):
            group = PYTHON if event is step else group_of(event.name, _within(event))
            add(group, event.name, str(event.input_shapes), event.self_cpu_time_total)
    operators = [OperatorTime(*key, seconds, int(calls)) for key, (seconds, calls) in times.items()]
    return sorted(operators, key=lambda operator: -operator.seconds)


def group_seconds(operators: list[OperatorTime]) -> dict[str, float]:
    """Seconds by group, largest first; groups without any are left out."""
    sums = {group: 0.0 for group in (*GROUPS, PYTHON, IDLE)}
    for operator in operators:
        sums[operator.group] += operator.seconds
    return dict(sorted(((group, s) for group, s in sums.items() if s), key=lambda item: -item[1]))


def _device_group(event: Any) -> str:
    group = group_of(event.name, _within(event))
    # A kernel that a range launches itself, such as a fused one, has no operator.
    return "norms, activations, rotary" if group == PYTHON else group


def _inside(step: Any) -> Iterator[Any]:
    waiting = [step]
    while waiting:
        event = waiting.pop()
        yield event
        waiting.extend(event.cpu_children)


def _within(event: Any) -> list[str]:
    names = []
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    return names[::-1]
