"""What a run reads before any model is built: configs of the models, data, guidance caches; each checked.

In the order in which failures are cheapest.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PretrainedConfig

from megatron_tgdpo.checkpoint_directory import (
    check_hf_files,
    hf_files,
    is_megatron_checkpoint,
    remove_incomplete,
)
from megatron_tgdpo.config import Config
from megatron_tgdpo.config_changes import INPUTS, Inputs
from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.data.joined import JoinedDataset, open_sources
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.same_ids import LackingTokens, compare_tokenizers
from megatron_tgdpo.data.tokenizers import Tokenizer, load_tokenizer
from megatron_tgdpo.data_order import DataOrder, DatasetPart, make_data_order
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.fingerprints import HASHES_FILE, hash_files, weight_files, weights_fingerprint
from megatron_tgdpo.guidance_cache import GuidanceCache, guidance_key, model_fingerprints
from megatron_tgdpo.hf_config import read_hf_config
from megatron_tgdpo.hub import local_path
from megatron_tgdpo.hub_inputs import Pins, record_pins
from megatron_tgdpo.model_config import transformer_config_kwargs
from megatron_tgdpo.pack_plan import check_row_fits
from megatron_tgdpo.packing import RowFormat
from megatron_tgdpo.parallel import ParallelLayout, make_layout
from megatron_tgdpo.precision import fp8_row_multiple
from megatron_tgdpo.prepared_data import Prepared, log_summary, write_summary
from megatron_tgdpo.ranks import RankEnvironment, on_first_rank
from megatron_tgdpo.rotary import longest_exact
from megatron_tgdpo.run_directory import claim_output_dir
from megatron_tgdpo.run_lock import RunLock
from megatron_tgdpo.stopping import leave_if_requested
from megatron_tgdpo.wandb_log import import_wandb

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class RunData:
    """The run's datasets, the order in which training takes its pairs, and the guidance caches where they are used.

    Validation sets go by the name that the configuration gives them; a single one without a name has ``""``.
    """

    train: PreferenceDataset
    validation: dict[str, PreferenceDataset]
    order: DataOrder
    train_guidance: GuidanceCache | None = None
    validation_guidance: dict[str, GuidanceCache] = field(default_factory=dict)


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


def prepare_first_rank(config: Config, lock: RunLock, pins: Pins | None = None) -> str:
    """Claims the output directory, preprocesses raw data and checks the guidance cache, once, on one rank, before any
    process group exists.

    Args:
        config: The run.
        lock: Of its output directory; taken here.
        pins: Of its names of the Hub, from ``hub_inputs.py``.

    Returns:
        JSON of the datasets, for :func:`open_data` on every rank.
    """
    hf_files(local_path(config.model.policy))  # every checkpoint gets a copy of them
    lacking = check_tokenizers(config)
    if config.log.wandb:
        import_wandb()
    lock.acquire()
    claim_output_dir(config)
    record_pins(Path(config.output_dir), pins or {})
    for left in remove_incomplete(Path(config.output_dir) / "checkpoints"):
        logger.warning("removed %s, left by a save that was interrupted", left)
    prepared = prepare_data(config, Path(config.output_dir) / "data", lacking)
    if config.guidance.mode == "cached":
        for name, each in prepared.items():
            cache = open_guidance(config, name, each.open())
            if config.guidance.verify:
                cache.check_content()
    write_summary(Path(config.output_dir), prepared)
    leave_if_requested("preparing the data")
    return json.dumps({name: asdict(each) for name, each in prepared.items()})


def check_inputs(config: Config, prepared: str, ranks: RankEnvironment, store: dist.Store) -> Inputs:
    """Fingerprints of all that the run reads, after checking the data, and the guidance cache's key, against them.

    Every rank calls, and reads a share of the files; no process group is needed. Files that are as they were when an
    earlier start of the run read them are not read again.

    Args:
        config: The run.
        prepared: From :func:`prepare_first_rank`.
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
        return weights + [Path(file) for dataset in _datasets(prepared).values() for file in dataset.files]

    record = Path(config.output_dir) / HASHES_FILE
    digests = hash_files(files, record, ranks, store, again=config.train.rehash)
    last = dist.PrefixStore("fingerprints", store)
    return json.loads(on_first_rank(lambda: json.dumps(_fingerprints(config, prepared, digests)), last, ranks.rank))


def _fingerprints(config: Config, prepared: str, digests: Mapping[str, str]) -> Inputs:
    """What :func:`check_inputs` finds, from the hashes of all files."""
    datasets = _datasets(prepared)
    for dataset in datasets.values():
        dataset.verify(digests)
    if config.guidance.mode == "cached":
        frozen = model_fingerprints(config, digests)
        for name, dataset in datasets.items():
            open_guidance(config, name, dataset).check_key(guidance_key(config, dataset, frozen))
    found: dict[str, str | None] = dict.fromkeys(INPUTS)
    for role, path in config.model_paths.items():
        found[f"model.{role}"] = weights_fingerprint(Path(path), digests)
    of_data = {name: each.fingerprint(datasets[name]) for name, each in _prepared(prepared).items()}
    found["data.train"] = of_data.pop("train")
    if of_data:
        # Of a single set without a name, its own.
        whole = sha256(json.dumps(of_data, sort_keys=True).encode()).hexdigest()
        found["data.validation"] = of_data.get("validation", whole)
    template = datasets["train"].manifest["tokenizer"]["template_fingerprint"]
    return found | {"data.tokenizer": datasets["train"].ids_fingerprint, "data.chat_template": template}


def _prepared(answer: str) -> dict[str, Prepared]:
    """The run's datasets by name, from what :func:`prepare_first_rank` returned."""
    return {name: Prepared(**each) for name, each in json.loads(answer).items()}


def _datasets(prepared: str) -> dict[str, PreferenceDataset]:
    return {name: each.open() for name, each in _prepared(prepared).items()}


def prepare_data(config: Config, cache_dir: Path, lacking: Sequence[LackingTokens]) -> dict[str, Prepared]:
    """The run's datasets by their names in ``config.datasets``, after preprocessing raw files into ``cache_dir``.

    Args:
        config: The run.
        cache_dir: For datasets made from raw files.
        lacking: From :func:`check_tokenizers`.

    Raises:
        UserError: A file is bad, a pair does not fit a row, or holds a token that some model's tokenizer lacks.
    """
    options = preprocess_options(config)
    opened = {name: open_sources(sources, options, str(cache_dir)) for name, sources in config.datasets.items()}
    for name, parts in opened.items():
        for dataset, weight in parts:
            log_summary(f"data.{name.replace('/', '.')}: {dataset.prefix}", dataset)
            check_row_fits(dataset, _whole_rows(config), config.row_multiple)
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


def open_guidance(config: Config, name: str, dataset: PreferenceDataset) -> GuidanceCache:
    """The guidance cache of a dataset of the run, by its name in ``config.datasets``."""
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
    # Divisible by what splits a row, and by what matrix units like or, in FP8, insist on.
    multiple = math.lcm(64, 2 * pg.cp.size() * pg.tp.size(), fp8_row_multiple(config)) if pg.pp.size() == 1 else None
    return replace(_whole_rows(config), context_rank=pg.cp.rank(), multiple=multiple)


def _whole_rows(config: Config) -> RowFormat:
    """The format without what depends on the rank."""
    shared, context = config.shared_prompts, config.parallel.context
    return RowFormat(config.row_tokens, shared, context, chosen_only=config.method.chosen_only)


def open_data(
    config: Config, prepared: str, configs: Mapping[str, PretrainedConfig], done: tuple[int, int] = (0, 0)
) -> RunData:
    """Opens the datasets that :func:`prepare_first_rank` named.

    Args:
        config: The run.
        prepared: As that returned them.
        configs: Of the models, by role.
        done: Steps that were made before, and how many pairs of ``data.train`` they consumed.

    Raises:
        UserError: A pair holds a token id that a model does not have, or warm-up takes all steps.
    """
    role, vocab_size = min(((role, found.vocab_size) for role, found in configs.items()), key=lambda item: item[1])
    datasets = _datasets(prepared)
    for name, dataset in datasets.items():
        largest = dataset.manifest["max_token_id"]
        if largest >= vocab_size:
            # The embedding would not notice: it is padded, and split over tensor ranks.
            raise UserError(
                f"data.{name}: holds token id {largest} but the vocabulary of model.{role} has {vocab_size} entries: "
                "preprocess with the policy's tokenizer"
            )
    train = datasets.pop("train")
    sizes = [len(part) for part in (train.parts if isinstance(train, JoinedDataset) else [train])]
    order = make_data_order(
        [DatasetPart(*part) for part in zip(sizes, _prepared(prepared)["train"].weights, strict=True)],
        config.batch.global_pairs,
        config.train.steps,
        config.train.epochs,
        config.data.shuffle,
        config.train.seed,
        *done,
    )
    if (config.optimizer.warmup_steps or 0) >= order.steps:
        raise UserError(
            f"optimizer.warmup_steps is {config.optimizer.warmup_steps} and the run has {order.steps} steps: the peak "
            "learning rate would never be reached, make it smaller"
        )
    caches = {}
    if config.guidance.mode == "cached":
        caches = {name: open_guidance(config, name, dataset) for name, dataset in {"train": train, **datasets}.items()}
    guidance = caches.pop("train", None)
    return RunData(train, _by_set(datasets), order, guidance, _by_set(caches))


def _by_set(by_name: Mapping[str, T]) -> dict[str, T]:
    """By the name that the configuration gives a validation set."""
    return {name.removeprefix("validation").removeprefix("/"): each for name, each in by_name.items()}
