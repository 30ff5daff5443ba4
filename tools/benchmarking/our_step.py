"""This project's step, built and run as the trainer does, in every guidance mode."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tgdpo.batch import PreferenceBatch, collate, pair_tokens, plan_packs
from megatron_tgdpo.config import Config, config_from_dict
from megatron_tgdpo.cpu_backend import enable_cpu_backend
from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.parallel import init_model_parallel, make_layout
from megatron_tgdpo.ranks import connect_store, init_distributed, read_rank_environment
from megatron_tgdpo.setup import build_engine, read_model_configs
from megatron_tgdpo.train_step import Engine, StepResult, train_step
from tools.benchmarking.problem import ALPHA, BETA, CLIP, LEARNING_RATE, Problem

_TIMEOUT_MINUTES = 60.0


def our_config(problem: Problem, *, guided: bool) -> Config:
    """The run's configuration, as a user would write it for one process."""
    values: dict[str, Any] = {
        "model": {"policy": problem.policy, "guide": problem.guide if guided else None},
        "data": {"train": problem.data, "max_length": problem.max_length, "shuffle": False},
        "loss": {"method": "tgdpo" if guided else "dpo", "beta": BETA, "alpha": ALPHA},
        "parallel": {"device": problem.device},
        "batch": {"global_pairs": problem.global_pairs},
        "optimizer": {"lr": LEARNING_RATE, "schedule": "constant", "warmup_ratio": 0.0, "clip_grad": CLIP},
        "precision": {"dtype": problem.dtype},
        "train": {"steps": problem.all_steps},
        "output_dir": str(Path(problem.data).parent / "run"),
    }
    return config_from_dict(values, "benchmark")


class OurStep:
    """A training engine in this process, and its steps."""

    def __init__(self, problem: Problem, config: Config) -> None:
        self.problem, self.config = problem, config
        self.dataset = PreferenceDataset(problem.data)
        device = torch.device(problem.device)
        if device.type == "cpu":
            enable_cpu_backend()
        ranks = read_rank_environment({})
        init_distributed(ranks, device, _TIMEOUT_MINUTES, connect_store(ranks))
        layout = make_layout(1, 1, 1, False, 1)
        pg = init_model_parallel(layout, config.train.seed, _TIMEOUT_MINUTES)
        self.engine: Engine = build_engine(config, read_model_configs(config), layout, pg, problem.all_steps, device)

    def packs(self, step: int) -> list[PreferenceBatch]:
        indices = self.problem.step_indices(step)
        tokens = pair_tokens(self.dataset.lengths[indices]).tolist()
        (plan,) = plan_packs(indices, tokens, self.config.row_tokens, 1)
        return [collate([self.dataset[index] for index in pack], self.config.row_tokens) for pack in plan]

    def step(self, step: int) -> StepResult:
        return train_step(self.engine, self.packs(step))
