"""Short trainings on the emulated GPU, on any layout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_tgdpo.batching.collate import PreferenceBatch, collate
from megatron_tgdpo.batching.packer import plan_packs
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.data.dataset import PreferencePair
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.gpu import options
from megatron_tgdpo.setup.engine import Engine, build_engine
from megatron_tgdpo.setup.model_inputs import read_model_configs
from megatron_tgdpo.training.checkpoint_saver import CheckpointSaver, checkpoint_path
from megatron_tgdpo.training.engine_state import load_checkpoint
from megatron_tgdpo.training.step import train_step
from tests.gpu.figures import random_pairs

CPU = torch.device("cpu")
# Sizes that FP8 kernels take, also halved by tensor parallelism.
ROW, LONGEST, VOCABULARY, MODEL = 512, 128, 256, {"hidden_size": 128, "mlp_size": 256, "layers": 2}
# Steps before the save, and steps after it.
BEFORE, AFTER = 2, 3
# Four pairs fill one pack, so that every other data rank has a pack of padding.
DATA = [random_pairs(4 + 4 * (step % 2), 96, VOCABULARY, step) for step in range(BEFORE + AFTER)]

Series = list[tuple[float, float]]


class Runs:
    """Trains the models of ``root`` on one layout.

    Args:
        root: Has ``policy`` and ``guide`` in it.
        layout: The parallel layout.
        pg: Its process groups.
    """

    def __init__(self, root: Path, layout: ParallelLayout, pg: ProcessGroupCollection) -> None:
        self.root, self.layout, self.pg = root, layout, pg

    def config(self, policy: Path | None = None, **sections: Any) -> Config:
        """A checked config."""
        values: dict[str, Any] = {
            "model": {
                "policy": str(policy or self.root / "policy"),
                "guide": str(self.root / "guide"),
                **sections.pop("model", {}),
            },
            "data": {"train": "unused", "max_length": LONGEST},
            "parallel": {
                "tensor": self.layout.tensor,
                "pipeline": self.layout.pipeline,
                "sequence_parallel": self.layout.sequence_parallel,
                **self.layout.expert_keys,
            },
            "batch": {"global_pairs": 4, "tokens_per_micro_batch": ROW},
            "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup_ratio": 0.0},
            "train": {"steps": 1000, "check_start": False},
            "output_dir": "unused",
            **sections,
        }
        config = config_from_dict(values)
        configs = read_model_configs(config)
        options.check_gpu_options(config, configs, self.layout, options.capabilities(CPU))
        return config

    def engine(self, config: Config) -> Engine:
        return build_engine(config, read_model_configs(config), self.layout, self.pg, 1000, CPU)

    def packs(self, pairs: Sequence[PreferencePair], engine: Engine) -> list[PreferenceBatch]:
        """This data rank's packs; one of padding where it has none."""
        lengths = np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs])
        tokens = engine.pack_format.pair_tokens(lengths).tolist()
        plan = plan_packs(range(len(pairs)), tokens, engine.pack_format.tokens, self.layout.data)
        return [collate([pairs[i] for i in pack], engine.pack_format, None) for pack in plan[self.pg.dp.rank()]]

    def steps(self, engine: Engine, data: Sequence[Sequence[PreferencePair]]) -> Series:
        """Loss and gradient norm of a step on each batch."""
        packs = [self.packs(pairs, engine) for pairs in data]
        results = [train_step(engine, p, n) for p, n in zip(packs, [*packs[1:], []], strict=True)]
        return [(result.metrics.values["loss"], result.grad_norm) for result in results]

    def save(self, engine: Engine, config: Config, out: Path) -> CheckpointSaver:
        """Begins a save in the background."""
        saver = CheckpointSaver(engine, out, self.root / "policy", config.checkpoint, 5)
        saver.save(BEFORE, {"dtype": "bf16", "data_fingerprint": "none", "consumed_pairs": 8, "config": {}})
        return saver

    def resumed(self, out: Path, **sections: Any) -> dict[str, Series]:
        """Saves while it trains on, then makes the steps after the save again, from what was saved.

        Returns:
            The steps before the save, after it, and made again.
        """
        config = self.config(**sections)
        engine = self.engine(config)
        before = self.steps(engine, DATA[:BEFORE])
        saver = self.save(engine, config, out)
        after = self.steps(engine, DATA[BEFORE:])
        saver.leave()
        assert not saver.has_failed
        return {"before": before, "after": after, "again": self.continued(out, **sections)}

    def continued(self, out: Path, **sections: Any) -> Series:
        """The steps after the save, from what was saved, maybe with other settings or on another layout."""
        engine = self.engine(self.config(**sections))
        load_checkpoint(engine, checkpoint_path(out, BEFORE), BEFORE)
        return self.steps(engine, DATA[BEFORE:])


@contextmanager
def dirty_memory(value: float) -> Iterator[None]:
    """Memory that is taken inside holds ``value`` where nobody has written."""
    taken = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = taken(*args, **kwargs)
        return tensor.fill_(value) if tensor.is_floating_point() else tensor

    with mock.patch.object(torch, "empty", empty):
        yield
