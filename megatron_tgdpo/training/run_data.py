"""What a run reads: its output directory claimed, data prepared, every input fingerprinted, and then opened.

In the order in which failures are cheapest.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from transformers import PretrainedConfig

from megatron_tgdpo.batching.sampler import DatasetPart, Sampler, make_sampler
from megatron_tgdpo.checkpoints.listing import remove_incomplete
from megatron_tgdpo.checkpoints.model_directory import hf_files
from megatron_tgdpo.config.resume_compatibility import INPUTS, Inputs
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.data.joined import JoinedDataset
from megatron_tgdpo.distributed.ranks import RankEnvironment, run_on_all_ranks, run_on_rank0
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.guidance.cache import GuidanceCache, guidance_key, model_fingerprints, open_guidance
from megatron_tgdpo.output.directory import claim_output_dir
from megatron_tgdpo.output.metrics_log import check_loggers
from megatron_tgdpo.resilience.run_lock import RunLock
from megatron_tgdpo.setup.datasets import Prepared, prepare_data, write_summary
from megatron_tgdpo.setup.fingerprints import HASHES_FILE, hash_files, weights_fingerprint
from megatron_tgdpo.setup.hub_inputs import Pins, record_pins
from megatron_tgdpo.setup.model_inputs import check_tokenizers
from megatron_tgdpo.setup.model_sources import check_bases, model_sources
from megatron_tgdpo.setup.trained_guide import check_trained
from megatron_tgdpo.signals import leave_if_requested
from megatron_tgdpo.storage.hub import local_path

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class RunData:
    """The run's datasets, the order in which training takes its pairs, and the guidance caches where they are used.

    Validation sets go by the name that the configuration gives them; a single one without a name has ``""``.
    """

    train: PreferenceDataset
    validation: dict[str, PreferenceDataset]
    order: Sampler
    train_guidance: GuidanceCache | None = None
    validation_guidance: dict[str, GuidanceCache] = field(default_factory=dict)


def prepare(
    config: Config, lock: RunLock, pins: Pins, ranks: RankEnvironment, store: dist.Store
) -> dict[str, Prepared]:
    """:func:`prepare_on_rank0`, for all ranks: every one calls, and gets the datasets by name.

    Raises:
        UserError: On every rank, for bad input; a StorageError where storage failed, which may pass.
        StoppedEarly: On every rank: rank 0 was asked to stop.
    """
    found = run_on_rank0(
        lambda: {name: asdict(each) for name, each in prepare_on_rank0(config, lock, pins).items()}, store, ranks.rank
    )
    return {name: Prepared(**each) for name, each in found.items()}


def prepare_on_rank0(config: Config, lock: RunLock, pins: Pins | None = None) -> dict[str, Prepared]:
    """Claims the output directory, preprocesses raw data and opens the guidance cache, once, on one rank, before any
    process group exists.

    Args:
        config: The run.
        lock: Of its output directory; acquired here.
        pins: Of its names of the Hub, from ``setup/hub_inputs.py``.

    Returns:
        The datasets by name, for :func:`open_data` on every rank.
    """
    hf_files(local_path(config.model.policy))  # every checkpoint gets a copy of them
    lacking = check_tokenizers(config)
    check_loggers(config)
    lock.acquire()
    claim_output_dir(config)
    record_pins(Path(config.output_dir), pins or {})
    for left in remove_incomplete(Path(config.output_dir) / "checkpoints"):
        logger.warning("removed %s, left by a save that was interrupted", left)
    prepared = prepare_data(config, Path(config.output_dir) / "data", lacking)
    if config.guidance.mode == "cached":
        for name, each in prepared.items():
            open_guidance(config.guidance, config.method, name, each.open())
    write_summary(Path(config.output_dir), prepared)
    leave_if_requested("preparing the data")
    return prepared


def check_inputs(config: Config, prepared: Mapping[str, Prepared], ranks: RankEnvironment, store: dist.Store) -> Inputs:
    """Fingerprints of all that the run reads, after checking the data, and the guidance cache's key, against them.

    Every rank calls, and reads a share of the files; no process group is needed. Files that are as they were when an
    earlier start of the run read them are not read again.

    Args:
        config: The run.
        prepared: From :func:`prepare`.
        ranks: This process's place.
        store: Joins all ranks; its keys must be unused.

    Returns:
        The same on every rank: a fingerprint for each key of ``config/resume_compatibility.py: INPUTS``, None where it
        is not used.

    Raises:
        UserError: On every rank: a file is not there, the data is damaged, or the cache is of something else; a
            StorageError where storage failed, which may pass.
        StoppedEarly: On every rank: some rank was asked to stop.
    """

    def files() -> list[Path]:
        weights = [file for source in model_sources(config).values() for file in source.files]
        return weights + [Path(file) for dataset in _open(prepared).values() for file in dataset.files]

    def check_caches() -> None:
        for name, dataset in _open(prepared).items():
            leave_if_requested("reading the guidance cache")
            cache = open_guidance(config.guidance, config.method, name, dataset)
            cache.check_content(ranks.rank, ranks.world_size)

    if config.guidance.mode == "cached" and config.guidance.verify:
        run_on_all_ranks(check_caches, dist.PrefixStore("caches", store), ranks)
    record = Path(config.output_dir) / HASHES_FILE
    digests = hash_files(files, record, ranks, store, again=config.train.rehash)
    last = dist.PrefixStore("fingerprints", store)
    return run_on_rank0(lambda: _fingerprints(config, prepared, digests), last, ranks.rank)


def _fingerprints(config: Config, prepared: Mapping[str, Prepared], digests: Mapping[str, str]) -> Inputs:
    """What :func:`check_inputs` finds, from the hashes of all files."""
    datasets = _open(prepared)
    for dataset in datasets.values():
        dataset.verify(digests)
    if config.guidance.mode == "cached":
        frozen = model_fingerprints(config, digests)
        for name, dataset in datasets.items():
            open_guidance(config.guidance, config.method, name, dataset).check_key(
                guidance_key(config, dataset, frozen)
            )
    found: dict[str, str | None] = dict.fromkeys(INPUTS)
    sources = model_sources(config)
    for role, source in sources.items():
        found[f"model.{role}"] = source.fingerprint(digests)
    if (adapter := sources["policy"].adapter) is not None:
        found["model.policy"] = weights_fingerprint(sources["policy"].base, digests)
        found["lora.adapter"] = weights_fingerprint(adapter, digests)
    check_bases(sources, found["model.policy"])
    of_data = {name: each.fingerprint(datasets[name]) for name, each in prepared.items()}
    found["data.train"] = of_data.pop("train")
    if of_data:
        # Of a single set without a name, its own.
        whole = sha256(json.dumps(of_data, sort_keys=True).encode()).hexdigest()
        found["data.validation"] = of_data.get("validation", whole)
    template = datasets["train"].manifest["tokenizer"]["template_fingerprint"]
    found |= {"data.tokenizer": datasets["train"].ids_fingerprint, "data.chat_template": template}
    check_trained(config, found)
    return found


def _open(prepared: Mapping[str, Prepared]) -> dict[str, PreferenceDataset]:
    return {name: each.open() for name, each in prepared.items()}


def open_data(
    config: Config,
    prepared: Mapping[str, Prepared],
    configs: Mapping[str, PretrainedConfig],
    done: tuple[int, int] = (0, 0),
) -> RunData:
    """Opens the datasets that :func:`prepare` named.

    Args:
        config: The run.
        prepared: As that returned them.
        configs: Of the models, by role.
        done: Steps that were made before, and how many pairs of ``data.train`` they consumed.

    Raises:
        UserError: A pair holds a token id that a model does not have, or warm-up takes all steps.
    """
    role, vocab_size = min(((role, found.vocab_size) for role, found in configs.items()), key=lambda item: item[1])
    datasets = _open(prepared)
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
    order = make_sampler(
        [DatasetPart(*part) for part in zip(sizes, prepared["train"].weights, strict=True)],
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
        caches = {
            name: open_guidance(config.guidance, config.method, name, dataset)
            for name, dataset in {"train": train, **datasets}.items()
        }
    guidance = caches.pop("train", None)
    return RunData(train, _by_set(datasets), order, guidance, _by_set(caches))


def _by_set(by_name: Mapping[str, T]) -> dict[str, T]:
    """By the name that the configuration gives a validation set."""
    return {name.removeprefix("validation").removeprefix("/"): each for name, each in by_name.items()}
