"""What a run reads before any model is built: configs of the models, data, guidance caches; each checked.

In the order in which failures are cheapest.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PretrainedConfig

from megatron_tgdpo.checkpoint_directory import check_hf_files, is_megatron_checkpoint, remove_incomplete
from megatron_tgdpo.config import Config
from megatron_tgdpo.config_changes import INPUTS, Inputs
from megatron_tgdpo.data.dataset import PreferenceDataset, open_or_preprocess
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.tokenizers import load_tokenizer
from megatron_tgdpo.data_order import DataOrder, make_data_order
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.fingerprints import HASHES_FILE, hash_files, weight_files, weights_fingerprint
from megatron_tgdpo.guidance_cache import GuidanceCache, guidance_key, model_fingerprints
from megatron_tgdpo.hf_config import read_hf_config
from megatron_tgdpo.model_config import transformer_config_kwargs
from megatron_tgdpo.pack_plan import check_row_fits
from megatron_tgdpo.packing import RowFormat
from megatron_tgdpo.parallel import ParallelLayout, make_layout
from megatron_tgdpo.ranks import RankEnvironment, on_first_rank
from megatron_tgdpo.run_directory import claim_output_dir
from megatron_tgdpo.run_lock import RunLock
from megatron_tgdpo.stopping import leave_if_requested
from megatron_tgdpo.wandb_log import import_wandb

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """The run's datasets, the order in which training takes its pairs, and the guidance caches where they are used."""

    train: PreferenceDataset
    validation: PreferenceDataset | None
    order: DataOrder
    train_guidance: GuidanceCache | None = None
    validation_guidance: GuidanceCache | None = None


def hf_directory(path: str) -> Path:
    """Where a model directory keeps its config and tokenizer: itself, or ``hf/`` in a Megatron checkpoint."""
    return Path(path) / "hf" if is_megatron_checkpoint(Path(path)) else Path(path)


def read_model_configs(config: Config) -> dict[str, PretrainedConfig]:
    """HF configs of the policy and of the frozen models that the method uses, checked to share one vocabulary.

    Raises:
        UserError: A directory holds no supported model, or vocabulary sizes differ.
    """
    paths = config.model_paths
    configs = {role: read_hf_config(Path(path)) for role, path in paths.items()}
    for role in configs:
        if configs[role].vocab_size != configs["policy"].vocab_size:
            raise UserError(
                f"model.{role} {paths[role]} has a vocabulary of {configs[role].vocab_size}, the policy "
                f"{configs['policy'].vocab_size}: all models must share one tokenizer"
            )
    return configs


def models_that_run(config: Config, configs: Mapping[str, PretrainedConfig]) -> dict[str, PretrainedConfig]:
    """Those of :func:`read_model_configs` that are loaded: the frozen ones are not where a cache stands for them."""
    cached = config.guidance.mode == "cached"
    return {role: hf_config for role, hf_config in configs.items() if role == "policy" or not cached}


def check_layout(configs: Mapping[str, PretrainedConfig], layout: ParallelLayout) -> None:
    """Checks that every model divides by the layout.

    Raises:
        UserError: One does not; the message names its role.
    """
    for role, hf_config in configs.items():
        try:
            transformer_config_kwargs(hf_config, layout, dtype=torch.float32, device=torch.device("cpu"))
        except UserError as error:
            raise UserError(f"model.{role}: {error}") from error


def check_tokenizers(config: Config) -> None:
    """Checks that reference and guide, where they carry a tokenizer, map text to ids as the policy does.

    Raises:
        UserError: One does not.
    """
    ours = _tokenizer_fingerprint(config.model.policy)
    for role, path in (("reference", config.model.reference), ("guide", config.model.guide)):
        theirs = _tokenizer_fingerprint(path) if path is not None else None
        if ours is not None and theirs is not None and ours != theirs:
            raise UserError(f"model.{role} {path} has another tokenizer than the policy {config.model.policy}")


def _tokenizer_fingerprint(path: str) -> str | None:
    directory = hf_directory(path)
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not any((directory / name).exists() for name in names):
        return None
    check_hf_files(Path(path))
    return load_tokenizer(str(directory)).fingerprint


def preprocess_options(config: Config) -> PreprocessOptions:
    """What the run asks of its data."""
    return PreprocessOptions(
        tokenizer=config.data.tokenizer or str(hf_directory(config.model.policy)),
        chat_template=config.data.chat_template,
        template_kwargs=config.data.template_kwargs or {},
        columns=config.data.columns or {},
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
        overlong_prompt=config.data.overlong_prompt,
        workers=config.data.workers,
        chosen_only=config.method.chosen_only,
    )


def prepare_first_rank(config: Config, lock: RunLock) -> str:
    """Claims the output directory, preprocesses raw data and checks the guidance cache, once, on one rank, before any
    process group exists.

    Args:
        config: The run.
        lock: Of its output directory; taken here.

    Returns:
        JSON of the dataset prefixes, for :func:`open_data` on every rank.
    """
    check_tokenizers(config)
    if config.log.wandb:
        import_wandb()
    lock.acquire()
    claim_output_dir(config)
    for left in remove_incomplete(Path(config.output_dir) / "checkpoints"):
        logger.warning("removed %s, left by a save that was interrupted", left)
    prefixes = prepare_data(config, Path(config.output_dir) / "data")
    if config.guidance.mode == "cached":
        for name, prefix in prefixes.items():
            cache = open_guidance(config, name, PreferenceDataset(prefix))
            if config.guidance.verify:
                cache.check_content()
    leave_if_requested("preparing the data")
    return json.dumps(prefixes)


def check_inputs(config: Config, prefixes: str, ranks: RankEnvironment, store: dist.Store) -> Inputs:
    """Fingerprints of all that the run reads, after checking the data, and the guidance cache's key, against them.

    Every rank calls, and reads a share of the files; no process group is needed. Files that are as they were when an
    earlier start of the run read them are not read again.

    Args:
        config: The run.
        prefixes: From :func:`prepare_first_rank`.
        ranks: This process's place.
        store: Joins all ranks; its keys must be unused.

    Returns:
        The same on every rank: a fingerprint for each key of ``config_changes.INPUTS``, None where it is not used.

    Raises:
        UserError: On every rank: a file is not there, the data is damaged, or the cache is of something else; a
            StorageError where storage failed, which may pass.
        StoppedEarly: On every rank: some rank was asked to stop.
    """

    def files() -> list[Path]:
        weights = [file for path in config.model_paths.values() for file in weight_files(Path(path))]
        return weights + [Path(file) for dataset in _datasets(prefixes).values() for file in dataset.files]

    record = Path(config.output_dir) / HASHES_FILE
    digests = hash_files(files, record, ranks, store, again=config.train.rehash)
    last = dist.PrefixStore("fingerprints", store)
    return json.loads(on_first_rank(lambda: json.dumps(_fingerprints(config, prefixes, digests)), last, ranks.rank))


def _fingerprints(config: Config, prefixes: str, digests: Mapping[str, str]) -> Inputs:
    """What :func:`check_inputs` finds, from the hashes of all files."""
    datasets = _datasets(prefixes)
    for dataset in datasets.values():
        dataset.verify(digests)
    if config.guidance.mode == "cached":
        frozen = model_fingerprints(config, digests)
        for name, dataset in datasets.items():
            open_guidance(config, name, dataset).check_key(guidance_key(config, dataset, frozen))
    made_with = datasets["train"].manifest["tokenizer"]
    found: dict[str, str | None] = dict.fromkeys(INPUTS)
    for role, path in config.model_paths.items():
        found[f"model.{role}"] = weights_fingerprint(Path(path), digests)
    found |= {f"data.{name}": dataset.fingerprint for name, dataset in datasets.items()}
    return found | {"data.tokenizer": made_with["fingerprint"], "data.chat_template": made_with["template_fingerprint"]}


def _datasets(prefixes: str) -> dict[str, PreferenceDataset]:
    """The run's datasets by name, from what :func:`prepare_first_rank` returned."""
    return {name: PreferenceDataset(prefix) for name, prefix in json.loads(prefixes).items()}


def prepare_data(config: Config, cache_dir: Path) -> dict[str, str]:
    """Prefixes of the run's datasets by name, preprocessing raw files into ``cache_dir`` where need be.

    Raises:
        UserError: A file is bad, or a pair does not fit a row.
    """
    options = preprocess_options(config)
    paths = {"train": config.data.train, "validation": config.data.validation}
    datasets = {
        name: open_or_preprocess(path, options, str(cache_dir)) for name, path in paths.items() if path is not None
    }
    for dataset in datasets.values():
        check_row_fits(dataset, _whole_rows(config), config.row_multiple)
    return {name: dataset.prefix for name, dataset in datasets.items()}


def open_guidance(config: Config, name: str, dataset: PreferenceDataset) -> GuidanceCache:
    """The guidance cache of a dataset of the run, ``train`` or ``validation``."""
    directory = Path(str(config.guidance.cache)) / name
    return GuidanceCache(directory, dataset.trained_lengths, use_guide=config.loss.method == "tgdpo")


def layout_of(config: Config, world_size: int) -> ParallelLayout:
    """The rank grid of a run."""
    parallel = config.parallel
    return make_layout(
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        parallel.sequence_parallel,
        world_size,
        parallel.virtual_pipeline or 1,
    )


def row_format(config: Config, pg: ProcessGroupCollection) -> RowFormat:
    """The format of this run's rows on this rank."""
    # Divisible by what splits a row, and by what matrix units like.
    multiple = math.lcm(64, 2 * pg.cp.size() * pg.tp.size()) if pg.pp.size() == 1 else None
    return replace(_whole_rows(config), context_rank=pg.cp.rank(), multiple=multiple)


def _whole_rows(config: Config) -> RowFormat:
    """The format without what depends on the rank."""
    shared, context = config.shared_prompts, config.parallel.context
    return RowFormat(config.row_tokens, shared, context, chosen_only=config.method.chosen_only)


def open_data(config: Config, prefixes: str, vocab_size: int, done: tuple[int, int] = (0, 0)) -> RunData:
    """Opens the datasets that :func:`prepare_first_rank` named.

    Args:
        config: The run.
        prefixes: As that returned them.
        vocab_size: Of the models.
        done: Steps that were made before, and how many pairs of ``data.train`` they consumed.

    Raises:
        UserError: A pair holds a token id that the models do not have.
    """
    datasets = _datasets(prefixes)
    for name, dataset in datasets.items():
        largest = dataset.manifest["max_token_id"]
        if largest >= vocab_size:
            # The embedding would not notice: it is padded, and split over tensor ranks.
            raise UserError(
                f"data.{name}: holds token id {largest} but the models' vocabulary has {vocab_size} entries: "
                "preprocess with the policy's tokenizer"
            )
    order = make_data_order(
        len(datasets["train"]),
        config.batch.global_pairs,
        config.train.steps,
        config.train.epochs,
        config.data.shuffle,
        config.train.seed,
        *done,
    )
    caches = {}
    if config.guidance.mode == "cached":
        caches = {name: open_guidance(config, name, dataset) for name, dataset in datasets.items()}
    return RunData(datasets["train"], datasets.get("validation"), order, caches.get("train"), caches.get("validation"))
