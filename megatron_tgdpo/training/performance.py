"""How fast steps are: what they work on, and the metrics that follow from it and their time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig

from megatron_tgdpo.batching.packed_sequence import PackFormat
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.planning.model_flops import step_flops, step_models
from megatron_tgdpo.planning.peak import peak_tflops


@dataclass(frozen=True)
class StepWork:
    """What one step works on, over all ranks.

    Attributes:
        real: Tokens of pairs.
        computed: Tokens of packs, with their padding.
        pairs: Pairs.
        flops: Model FLOP (``planning/model_flops.py``).
    """

    real: int
    computed: int
    pairs: int
    flops: int


class Performance:
    """Counts the work of a run's steps and tells their speed.

    Args:
        config: The run.
        configs: HF configs of the models that run, by role.
        pack_format: Of the packs.
        world_size: Ranks, each a GPU where there are any.
        device: This rank's.
    """

    def __init__(
        self,
        config: Config,
        configs: Mapping[str, PretrainedConfig],
        pack_format: PackFormat,
        world_size: int,
        device: torch.device,
    ) -> None:
        frozen = [hf_config for role, hf_config in configs.items() if role != "policy"]
        self._models = step_models(configs["policy"], frozen, adapter=config.lora.trains)
        self._format, self._world_size = pack_format, world_size
        recipe, dtype = config.precision.policy_recipe, config.precision.dtype
        # FP4, and fp32 by whatever products torch makes it of, have no peak here.
        precision = dtype if recipe is None else "fp8" if config.precision.fp4 == "none" else recipe
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = peak_tflops(name, precision)

    def work(self, lengths: np.ndarray, trained: np.ndarray, packs: Sequence[int]) -> StepWork:
        """Of a step.

        Args:
            lengths: [P, 3] int64, prompt, chosen and rejected tokens of its pairs.
            trained: [P, 3] int64, the same, of responses those that are trained on.
            packs: Tokens that are used of each pack, over all ranks.
        """
        shared, chosen = self._format.shared_prompts, self._format.chosen_only
        responses = int(trained[:, 1:2].sum() if chosen else trained[:, 1:].sum())
        return StepWork(
            self._format.real_tokens(lengths),
            sum(map(self._format.cut, packs)),
            len(lengths),
            step_flops(self._models, lengths, responses, shared_prompts=shared, chosen_only=chosen),
        )

    def metrics(self, seconds: float, work: StepWork, data_seconds: float, peak_gib: float) -> dict[str, float]:
        """Of a step that took so long, of which it waited for its data, on ranks of which one had so much memory."""
        rate = 1 / seconds / self._world_size
        tflops = work.flops * rate / 1e12
        values = {
            "perf/pairs_per_second": work.pairs / seconds,
            "perf/pairs_per_second_per_gpu": work.pairs * rate,
            "perf/tokens_per_second": work.real / seconds,
            "perf/tokens_per_second_per_gpu": work.real * rate,
            "perf/tflops_per_gpu": tflops,
            "perf/step_seconds": seconds,
            "perf/data_seconds": data_seconds,
            "perf/packing_efficiency": work.real / work.computed,
            "perf/peak_memory_gib": peak_gib,
        }
        return values if self._peak is None else values | {"perf/mfu": tflops / self._peak}
