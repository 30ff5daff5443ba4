"""One rank with models on it: what the parts of ``prove.py`` train and time."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from megatron_tgdpo.batching.collate import PreferenceBatch, collate
from megatron_tgdpo.batching.packed_sequence import PackFormat
from megatron_tgdpo.batching.packer import plan_packs
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.data.dataset import PreferencePair
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend
from megatron_tgdpo.distributed.layout import init_model_parallel, make_layout
from megatron_tgdpo.gpu.options import capabilities, check_gpu_options
from megatron_tgdpo.models.fp8_tensors import write_parameter
from megatron_tgdpo.models.language_model import LanguageModel
from megatron_tgdpo.setup.engine import Engine, build_engine
from megatron_tgdpo.setup.model_inputs import read_model_configs
from megatron_tgdpo.training.step import train_step


class Zeros:
    """A guidance cache that says 0 nats for every token: for speed only."""

    guided = True

    def __init__(self, pairs: Sequence[PreferencePair]) -> None:
        self._tokens = {pair.index: len(pair.chosen) + len(pair.rejected) for pair in pairs}

    def logps(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        zeros = np.zeros(self._tokens[index], dtype=np.float32)
        return zeros, zeros


class Bench:
    """The process groups of one rank, and engines on its device.

    Args:
        device: Where models are.
        root: For model directories.
    """

    def __init__(self, device: torch.device, root: Path) -> None:
        self.device, self.root = device, root
        if device.type == "cpu":
            enable_cpu_backend()
        else:
            torch.cuda.set_device(0)
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.layout = make_layout(1, 1, 1, False, 1)
        self.pg = init_model_parallel(self.layout, seed=1, timeout_minutes=5)
        self.found = capabilities(device)

    def config(self, policy: Path, guide: Path, pack: int, longest: int, **sections: Any) -> Config:
        """A checked config; UserError where this machine lacks what it asks for."""
        values: dict[str, Any] = {
            "model": {"policy": str(policy), "guide": str(guide), **sections.pop("model", {})},
            "data": {"train": "unused", "max_length": longest},
            "batch": {"global_pairs": 1, "tokens_per_micro_batch": pack},
            "optimizer": {"lr": 1e-4, "schedule": "constant", "warmup_ratio": 0.0},
            "train": {"steps": 1000, "check_start": False},
            "output_dir": "unused",
            **sections,
        }
        config = config_from_dict(values)
        check_gpu_options(config, read_model_configs(config), self.layout, self.found)
        return config

    def engine(self, config: Config) -> Engine:
        return build_engine(config, read_model_configs(config), self.layout, self.pg, 1000, self.device)

    def losses(self, config: Config, batches: Sequence[Sequence[PreferencePair]]) -> list[float]:
        """Trains on each batch in turn; the loss of every step."""
        self.forget()
        engine = self.engine(config)
        return [train_step(engine, packs_of(batch, engine.pack_format)).metrics.values["loss"] for batch in batches]

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget(self) -> None:
        """Gives back what earlier engines held, and counts peak memory anew."""
        gc.collect()
        # What was compiled for other models and dtypes would count towards torch's limit for these.
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def timed(self, step: Callable[[], Any], warm_up: int, count: int) -> tuple[float, float]:
        """Seconds of a step, and peak memory in GiB (0 on the CPU)."""
        for _ in range(warm_up):
            step()
        self.synchronize()
        begin = time.monotonic()
        for _ in range(count):
            step()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        return (time.monotonic() - begin) / count, peak


def packs_of(
    pairs: Sequence[PreferencePair], pack_format: PackFormat, *, cached: bool = False
) -> list[PreferenceBatch]:
    """The packs of one step."""
    lengths = np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs])
    (plan,) = plan_packs(range(len(pairs)), pack_format.pair_tokens(lengths).tolist(), pack_format.tokens, 1)
    guidance = Zeros(pairs) if cached else None
    return [collate([pairs[i] for i in pack], pack_format, guidance) for pack in plan]


@contextmanager
def random_weights() -> Iterator[None]:
    """Models get random weights inside, without reading or writing files: for speed only."""

    @torch.no_grad()
    def fill(model: LanguageModel, path: Path, hf_config: PretrainedConfig, pg: Any) -> None:
        del path, hf_config, pg
        for parameter in model.parameters():
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=parameter.device)
            write_parameter(parameter, value.normal_(0.0, 0.02) if value.dim() > 1 else value.fill_(1.0))

    with mock.patch("megatron_tgdpo.setup.models.load_hf_weights", fill):
        yield
