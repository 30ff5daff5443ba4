"""This project's step, built and run as a training run of one process builds and runs it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tgdpo.batching.collate import PreferenceBatch, collate
from megatron_tgdpo.batching.packer import plan_packs
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend
from megatron_tgdpo.distributed.layout import init_model_parallel
from megatron_tgdpo.distributed.ranks import RankEnvironment, connect_store, init_distributed
from megatron_tgdpo.resilience.run_lock import RunLock
from megatron_tgdpo.setup.engine import build_engine
from megatron_tgdpo.setup.layout import fitted_layout, layout_of
from megatron_tgdpo.setup.model_inputs import models_that_run, read_model_configs
from megatron_tgdpo.training.run_data import open_data, prepare
from megatron_tgdpo.training.step import StepResult, train_step
from tools.benchmarks.training_step.problem import ALPHA, BETA, CLIP, LEARNING_RATE, LORA_LEARNING_RATE, Problem
from tools.benchmarks.training_step.recorder import Recorder


def our_config(
    problem: Problem,
    *,
    guided: bool,
    mode: str,
    shared_prompts: bool = True,
    lora: bool = False,
    train: Mapping[str, Any] | None = None,
    offload: Mapping[str, Any] | None = None,
    parallel: Mapping[str, Any] | None = None,
    pack_tokens: int | None = None,
) -> Config:
    """The configuration of the run that the steps are of.

    Args:
        problem: What is compared.
        guided: TGDPO; else DPO.
        mode: ``guidance.mode``.
        shared_prompts: ``batch.shared_prompts``.
        lora: An adapter of the policy trains. For TGDPO the guide is another one, the reference the base; for DPO the
            reference is the adapter as it begins, as in TRL.
        train: More values of the section ``train``.
        offload: Values of the section ``offload``.
        parallel: More values of the section ``parallel``.
        pack_tokens: ``batch.tokens_per_micro_batch``.
    """
    name = f"run-{'tgdpo' if guided else 'dpo'}-{mode}-{'shared' if shared_prompts else 'unshared'}"
    guide = problem.guide_adapter if lora else problem.guide
    values: dict[str, Any] = {
        "model": {
            "policy": problem.policy,
            "reference": problem.policy if lora and guided else None,
            "guide": guide if guided else None,
        },
        "lora": {"adapter": problem.adapter if lora else None},
        "data": {
            "train": problem.data,
            "tokenizer": problem.tokenizer,
            "max_length": problem.max_length,
            "shuffle": False,
        },
        "loss": {"method": "tgdpo", "beta": BETA, "alpha": ALPHA} if guided else {"method": "dpo", "beta": BETA},
        "guidance": {"mode": mode, "cache": problem.cache},
        "parallel": {"device": problem.device, **(parallel or {})},
        "batch": {
            "global_pairs": problem.global_pairs,
            "shared_prompts": shared_prompts,
            "tokens_per_micro_batch": pack_tokens,
        },
        "optimizer": {
            "lr": LORA_LEARNING_RATE if lora else LEARNING_RATE,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "clip_grad": CLIP,
        },
        "precision": {"dtype": problem.dtype},
        # A policy with an adapter is not its reference.
        "train": {"steps": problem.steps, "check_start": not lora, **(train or {})},
        "offload": dict(offload or {}),
        "output_dir": str(Path(problem.directory) / name),
    }
    return config_from_dict(values, "benchmark")


ALONE = RankEnvironment(0, 1, 0, None, None)


class OurStep:
    """A training run up to its first step, in this process, and its steps.

    Args:
        config: The run.
        ranks: This process's place; alone by default. Every rank calls.

    Attributes:
        layout: With the layers of its stages.
    """

    def __init__(self, config: Config, ranks: RankEnvironment = ALONE) -> None:
        device = torch.device(config.parallel.device)
        if device.type == "cpu":
            enable_cpu_backend()
        store, model_configs = connect_store(ranks), read_model_configs(config)
        layout = layout_of(config.parallel, ranks.world_size)
        self.layout = layout = fitted_layout(config, models_that_run(config, model_configs), layout)
        prefixes = prepare(config, RunLock(Path(config.output_dir)), {}, ranks, dist.PrefixStore("prepare", store))
        init_distributed(ranks, device, config.parallel.timeout_minutes, store)
        pg = init_model_parallel(layout, config.train.seed, config.parallel.timeout_minutes)
        self.data = open_data(config, prefixes, model_configs)
        self.engine = build_engine(config, model_configs, layout, pg, self.data.order.steps, device)

    def packs(self, step: int) -> list[PreferenceBatch]:
        """This rank's packs of a step, counted from 1."""
        pack_format, dataset = self.engine.pack_format, self.data.train
        indices = self.data.order.step_indices(step)
        tokens, layout = pack_format.pair_tokens(dataset.lengths[indices]).tolist(), self.layout
        multiple = layout.pipeline if layout.virtual > 1 else 1
        plans = plan_packs(indices, tokens, pack_format.tokens, layout.data, multiple)
        plan = plans[self.engine.pg.dp.rank()]
        return [collate([dataset[index] for index in pack], pack_format, self.data.train_guidance) for pack in plan]

    def step(self, step: int) -> StepResult:
        return train_step(self.engine, self.packs(step))


def run(problem: Problem, recorder: Recorder, config: Config) -> None:
    """All steps of a problem."""
    variant = OurStep(config)
    recorder.built(weight for chunk in variant.engine.chunks for weight in chunk.parameters())
    for step in range(1, problem.steps + 1):
        recorder.begin()
        recorder.end(variant.step(step).metrics.values["loss"])
