"""The Adam with one step count per group equals torch's, also through its state dict; schedules equal transformers'."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import get_scheduler

from megatron_tgdpo.config.schema import OptimizerSettings
from megatron_tgdpo.setup.learning_rate import build_scheduler
from megatron_tgdpo.setup.optimizer import GroupStepAdamW


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def parameters(*shape: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(9)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(2)]


def test_equals_torch_and_survives_its_state_dict() -> None:
    theirs, ours = parameters(5, 3), parameters(5, 3)
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.1)
    optimizer = GroupStepAdamW(ours, lr=0.1, weight_decay=0.1)
    for seed in range(3):
        step(reference, seed)
        step(optimizer, seed)
    saved = copy.deepcopy(optimizer.state_dict())
    assert {float(state["step"]) for state in saved["state"].values()} == {3.0}
    resumed = GroupStepAdamW(ours, lr=0.1, weight_decay=0.1)
    resumed.load_state_dict(saved)
    assert not any("step" in state for state in resumed.state.values())
    for seed in range(3, 6):
        step(reference, seed)
        step(resumed, seed)
    for want, got in zip(theirs, ours, strict=True):
        assert torch.equal(want, got)


def test_taking_over_moments_that_exist_already() -> None:
    theirs, ours = parameters(67, 9), parameters(67, 9)
    # Fused as what takes over is: the kernels of the two implementations round differently.
    reference = torch.optim.AdamW(theirs, lr=0.1, fused=True)
    optimizer = GroupStepAdamW.taking_over(torch.optim.AdamW(ours, lr=0.1))
    for param in ours:
        optimizer.state[param] = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
    for seed in range(6):
        step(reference, seed)
        step(optimizer, seed)
    assert all(torch.equal(want, got) for want, got in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.33])
def test_schedules(schedule: str, warmup_ratio: float) -> None:
    total = 21
    settings = OptimizerSettings(lr=0.3, schedule=schedule, warmup_ratio=warmup_ratio)
    groups = SimpleNamespace(param_groups=[{"params": []}])
    ours = build_scheduler(groups, settings, total)  # type: ignore[arg-type]
    reference = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    warmup = {0.0: 0, 0.1: 3, 0.33: 7}[warmup_ratio]
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, reference, num_warmup_steps=warmup, num_training_steps=total)
    for _ in range(total):
        assert groups.param_groups[0]["lr"] == pytest.approx(reference.param_groups[0]["lr"], abs=1e-12)
        ours.step(1)
        reference.step()
        theirs.step()


def test_one_step_with_warm_up_is_possible() -> None:
    groups = SimpleNamespace(param_groups=[{"params": []}])
    build_scheduler(groups, OptimizerSettings(lr=0.3, warmup_ratio=0.1), 1)  # type: ignore[arg-type]
    assert groups.param_groups[0]["lr"] == 0.3
