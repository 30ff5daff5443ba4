"""The pairs of a report and their log-probs: from a guidance cache, or from Hugging Face model directories."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.data.dataset import PreferenceDataset, PreferencePair
from megatron_tgdpo.data.joined import join, open_sources
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.guidance.cache import GuidanceCache, guidance_key, open_guidance
from megatron_tgdpo.setup.datasets import preprocess_options
from tgdpo.generation.models import hf_directory
from tgdpo.reporting.hf_logps import response_logps


class GuidanceLogps(Protocol):
    """The part of :class:`megatron_tgdpo.guidance.cache.GuidanceCache` that is needed here."""

    def logps(self, pair_index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Log-probs [c + r] of the reference and, if it is there, of the guide; chosen tokens, then rejected ones."""
        ...


def open_split(config: Config, split: str) -> PreferenceDataset:
    """Opens one of ``config.datasets`` as the run does; raw files are tokenised once, in ``output_dir``.

    Args:
        config: The run.
        split: ``train``, ``validation`` or ``validation/NAME``.

    Raises:
        UserError: The config has no such data, or it cannot be read.
    """
    datasets = config.datasets
    if split not in datasets:
        there, key = ", ".join(datasets), split.replace("/", ".")
        raise UserError(f"data.{key} is not set in the config: choose another --split ({there})")
    opened = open_sources(datasets[split], preprocess_options(config), str(Path(config.output_dir) / "data"))
    return join([dataset for dataset, _ in opened])


def choose_pairs(dataset: PreferenceDataset, count: int) -> list[PreferencePair]:
    """``count`` pairs spread evenly over the dataset, or all of a smaller one."""
    size = min(count, len(dataset))
    return [dataset[k * len(dataset) // size] for k in range(size)]


def open_cache(config: Config, split: str, dataset: PreferenceDataset) -> GuidanceCache:
    """The split's part of ``guidance.cache``, whichever models it was made with.

    Raises:
        UserError: It is missing, damaged, or of other data.
    """
    cache = open_guidance(config.guidance, config.method, split, dataset)
    of_data = guidance_key(config, dataset, (cache.key.reference, cache.key.guide))
    cache.check_key(replace(of_data, dtype=cache.key.dtype))
    if config.guidance.verify:
        cache.check_content()
    return cache


def cached_logps(
    cache: GuidanceLogps, name: str, pairs: Sequence[PreferencePair], places: Sequence[str]
) -> dict[str, list[np.ndarray]]:
    """Log-probs of reference and guide from a cache, by model; a float32 [c + r] a pair.

    Args:
        cache: The cache.
        name: How errors call it.
        pairs: Of the dataset that the cache was made for.
        places: Where each came from, for errors.

    Raises:
        UserError: The cache holds no guide, or was made for other pairs.
    """
    found: dict[str, list[np.ndarray]] = {"reference": [], "guide": []}
    for pair, place in zip(pairs, places, strict=True):
        reference, guide = cache.logps(pair.index)
        if guide is None:
            raise UserError(f"{name}: holds the reference alone: compute a cache with model.guide set")
        for model, values in (("reference", reference), ("guide", guide)):
            if len(values) != sum(pair.trained_lengths):
                raise UserError(
                    f"{name}: holds {len(values)} response tokens for {place}, the data has "
                    f"{sum(pair.trained_lengths)}: it was made for other data"
                )
            found[model].append(np.asarray(values, dtype=np.float32))
    return found


def model_logps(
    models: Mapping[str, str],
    pairs: Sequence[PreferencePair],
    dtype: torch.dtype,
    device: torch.device,
    bases: Mapping[str, Path],
) -> dict[str, list[np.ndarray]]:
    """The same from HF directories, Megatron checkpoints and adapters, one model in memory at a time.

    ``bases`` are base models, where they are known otherwise than by an adapter's directory.

    Raises:
        UserError: A directory holds no model that can be read.
    """
    found = {}
    for name, model in models.items():
        with hf_directory(Path(model), base=bases.get(name)) as directory:
            found[name] = response_logps(directory, pairs, dtype, device, label=name)
    return found


def check_finite(logps: Mapping[str, Sequence[np.ndarray]], places: Sequence[str]) -> None:
    """Raises a UserError that names the model and the first pair with a log-prob that is not finite."""
    for model, arrays in logps.items():
        for place, values in zip(places, arrays, strict=True):
            if not np.isfinite(values).all():
                raise UserError(
                    f"{place}: the {model} gives it a log-prob that is not finite: check the model's weights"
                )
