"""What a run reads before any model is built: configs of the models, data, guidance caches; each checked.

In the order in which failures are cheapest.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PretrainedConfig

from megatron_tgdpo.batching.packed_sequence import PackFormat
from megatron_tgdpo.batching.packer import check_pairs_fit
from megatron_tgdpo.batching.sampler import DatasetPart
from megatron_tgdpo.checkpoints.directory import check_hf_files, is_megatron_checkpoint
from megatron_tgdpo.config.schema import Config, ParallelConfig
from megatron_tgdpo.data.joined import open_sources
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.same_ids import LackingTokens, compare_tokenizers
from megatron_tgdpo.data.tokenizers import Tokenizer, load_tokenizer
from megatron_tgdpo.distributed.layout import ParallelLayout, make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.gpu.precision import fp8_seq_length_multiple
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.rotary import longest_exact
from megatron_tgdpo.setup.prepared_data import Prepared, log_summary
from megatron_tgdpo.storage.hub import local_path

logger = logging.getLogger(__name__)


def hf_directory(path: str) -> Path:
    """Where a model directory keeps its config and tokenizer: itself, or ``hf/`` in a Megatron checkpoint."""
    directory = local_path(path)
    return directory / "hf" if is_megatron_checkpoint(directory) else directory


def read_model_configs(config: Config) -> dict[str, PretrainedConfig]:
    """HF configs of the policy and of the frozen models that the method uses.

    Raises:
        UserError: A directory holds no supported model, or one that sequences of this length are too long for, or
            vocabulary sizes differ without tokenizers to compare.
    """
    paths = config.model_paths
    configs = {role: read_hf_config(Path(path)) for role, path in paths.items()}
    for role in configs:
        # An embedding may have rows that no token has; without a tokenizer beside it nobody can tell.
        told = _has_tokenizer(paths[role]) and _has_tokenizer(paths["policy"])
        if configs[role].vocab_size != configs["policy"].vocab_size and not told:
            raise UserError(
                f"model.{role} {paths[role]} has a vocabulary of {configs[role].vocab_size}, the policy "
                f"{configs['policy'].vocab_size}, and both tokenizers are needed to see that the ids are the same: put "
                "them into the directories"
            )
        longest = longest_exact(configs[role])
        if longest is not None and config.longest_sequence > longest:
            raise UserError(
                f"model.{role} {paths[role]}: config.json has dynamic rope scaling, which beyond "
                f"max_position_embeddings ({longest}) depends on the longest sequence of a batch: set data.max_length "
                f"to at most {longest}"
            )
    return configs


def models_that_run(config: Config, configs: Mapping[str, PretrainedConfig]) -> dict[str, PretrainedConfig]:
    """Those of :func:`read_model_configs` that are loaded: the frozen ones are not where a cache stands for them."""
    cached = config.guidance.mode == "cached"
    return {role: hf_config for role, hf_config in configs.items() if role == "policy" or not cached}


def check_tokenizers(config: Config) -> list[LackingTokens]:
    """Checks that policy, reference and guide, where they carry a tokenizer, map text to ids as the data's does.

    Returns:
        What data must not hold, see :func:`prepare_data`.

    Raises:
        UserError: One does not.
    """
    models = {"policy": config.model.policy, "reference": config.model.reference, "guide": config.model.guide}
    return compare_with_data(config, {role: path for role, path in models.items() if path is not None})


def compare_with_data(config: Config, models: Mapping[str, str]) -> list[LackingTokens]:
    """As :func:`check_tokenizers`, for other models of a run's data: directories by role."""
    path = config.data.tokenizer or config.model.policy
    if not (config.data.tokenizer or _has_tokenizer(path)):
        return []
    others = {role: model for role, model in models.items() if model != path and _has_tokenizer(model)}
    data = f"data.tokenizer {path}" if config.data.tokenizer else f"the policy {path}"
    if not others:
        return []
    ours = _tokenizer(path, config.data.chat_template)
    return [
        compare_tokenizers(f"model.{role} {model}", _tokenizer(model), data, ours) for role, model in others.items()
    ]


def _tokenizer(path: str, chat_template: str | None = None) -> Tokenizer:
    """That of a model directory, HF or Megatron, or of a path of its own."""
    directory = local_path(path)
    if directory.is_dir():
        check_hf_files(directory)
        return load_tokenizer(str(hf_directory(path)), chat_template)
    return load_tokenizer(path, chat_template)


def _has_tokenizer(path: str) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    return any((hf_directory(path) / name).exists() for name in names)


def preprocess_options(config: Config) -> PreprocessOptions:
    """What the run asks of its data."""
    return PreprocessOptions(
        tokenizer=str(
            local_path(config.data.tokenizer) if config.data.tokenizer else hf_directory(config.model.policy)
        ),
        chat_template=config.data.chat_template,
        template_kwargs=config.data.template_kwargs or {},
        columns=config.data.columns or {},
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
        overlong_prompt=config.data.overlong_prompt,
        workers=config.data.workers,
        chosen_only=config.method.chosen_only,
    )


def prepare_data(config: Config, cache_dir: Path, lacking: Sequence[LackingTokens]) -> dict[str, Prepared]:
    """The run's datasets by their names in ``config.datasets``, after preprocessing raw files into ``cache_dir``.

    Args:
        config: The run.
        cache_dir: For datasets made from raw files.
        lacking: From :func:`check_tokenizers`.

    Raises:
        UserError: A file is bad, a pair does not fit a pack, or holds a token that some model's tokenizer lacks.
    """
    options = preprocess_options(config)
    opened = {name: open_sources(sources, options, str(cache_dir)) for name, sources in config.datasets.items()}
    for name, parts in opened.items():
        for dataset, weight in parts:
            log_summary(f"data.{name.replace('/', '.')}: {dataset.prefix}", dataset)
            check_pairs_fit(dataset, _whole_packs(config), config.seq_length_multiple)
            for tokens in lacking:
                tokens.check(dataset)
            if name == "train" and not DatasetPart(len(dataset), weight).draws:
                raise UserError(
                    f"data.train: a weight of {weight:g} takes none of the {len(dataset)} pairs of {dataset.prefix}: "
                    "raise it, or leave the dataset out"
                )
    return {
        name: Prepared([dataset.prefix for dataset, _ in parts], [weight for _, weight in parts])
        for name, parts in opened.items()
    }


def layout_of(parallel: ParallelConfig, world_size: int) -> ParallelLayout:
    """The parallel layout of a run."""
    return make_layout(
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        parallel.sequence_parallel,
        world_size,
        parallel.virtual_pipeline or 1,
    )


def pack_format(config: Config, pg: ProcessGroupCollection) -> PackFormat:
    """The format of this run's packs on this rank."""
    # Divisible by what splits a pack, and by what matrix units like or, in FP8, insist on.
    multiple = (
        math.lcm(64, 2 * pg.cp.size() * pg.tp.size(), fp8_seq_length_multiple(config)) if pg.pp.size() == 1 else None
    )
    return replace(_whole_packs(config), context_rank=pg.cp.rank(), multiple=multiple)


def _whole_packs(config: Config) -> PackFormat:
    """The format without what depends on the rank."""
    shared, context = config.shared_prompts, config.parallel.context
    return PackFormat(config.seq_length, shared, context, chosen_only=config.method.chosen_only)
