"""A run's datasets: prepared once, opened on every rank, and what became of their records."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tgdpo.batching.packer import check_pairs_fit
from megatron_tgdpo.batching.sampler import DatasetPart
from megatron_tgdpo.checkpoints.model_directory import hf_directory
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.data.dataset import PreferenceDataset, prepared_prefix
from megatron_tgdpo.data.joined import join, open_sources
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.preprocess import try_first_records
from megatron_tgdpo.data.records import detect_format, read_records
from megatron_tgdpo.data.sources import find_files
from megatron_tgdpo.data.summary import lost_ends, lost_ends_warning, summary_line
from megatron_tgdpo.data.tokenizer_compatibility import LackingTokens
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.output.directory import SUMMARY_FILE
from megatron_tgdpo.setup.layout import whole_packs
from megatron_tgdpo.storage.atomic_file import write_atomically
from megatron_tgdpo.storage.hub import local_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counted:
    """``data.train`` as far as it is known before all of it is tokenised.

    Attributes:
        parts: Pairs and weight of each dataset or raw file; of a file, its records.
        pair_tokens: Mean tokens of a pair, both its sequences together.
        response_share: The part of them that is response.
        tried: How many records of raw files were tokenised to find these means; None where all data is preprocessed.
        warning: What to tell people of those that were cut, if anything.
    """

    parts: list[DatasetPart]
    pair_tokens: float
    response_share: float
    tried: int | None
    warning: str | None


def count_training_data(config: Config, *, whole: bool = True) -> Counted:
    """Counts the pairs and tokens of a run, for a dry run; the first records of raw files are tokenised, none is kept.

    Args:
        config: The run.
        whole: Whether raw files are read to their end, to count their records; else the parts of these are those that
            were tokenised.

    Raises:
        UserError: A file is not there, or malformed; a StorageError where it cannot be read.
    """
    parts, means, tried, truncated, responses = [], [], 0, Counter[str](), 0
    options = preprocess_options(config)
    for source in config.datasets["train"]:
        prefix = prepared_prefix(source.path)
        if prefix is not None:
            lengths = PreferenceDataset(prefix).lengths
            pairs = len(lengths)
        else:
            first = try_first_records([source], options)
            lengths, pairs = first.lengths, first.records
            tried += first.records
            truncated += first.truncated
            responses += int((lengths[:, 1:] > 0).sum())
            if whole:
                pairs = sum(1 for file in find_files(source) for _ in read_records(file, detect_format(file)))
        parts.append(DatasetPart(pairs, source.weight))
        means.append(lengths.mean(axis=0) if len(lengths) else np.zeros(3))
    taken = [part.pairs * part.weight for part in parts]
    prompt, *answers = np.average(means, axis=0, weights=taken if any(taken) else None)
    # One response, or two behind a prompt each.
    answers = answers[:1] if config.method.chosen_only else answers
    total = len(answers) * prompt + sum(answers)
    warning = lost_ends_warning("data.train", truncated, responses, options.max_length)
    return Counted(parts, float(total), float(sum(answers) / max(total, 1)), tried or None, warning)


@dataclass(frozen=True)
class Prepared:
    """A dataset of the run as :func:`prepare_data` leaves it: prefixes of its parts, and the weight of each."""

    prefixes: list[str]
    weights: list[float]

    def open(self) -> PreferenceDataset:
        """Its parts as one dataset.

        Raises:
            UserError: One is incomplete or damaged.
        """
        return join([PreferenceDataset(prefix) for prefix in self.prefixes])

    def fingerprint(self, dataset: PreferenceDataset) -> str:
        """sha256 (hex) of its tokens and, unless all are 1, weights; ``dataset`` is what :meth:`open` returned."""
        if set(self.weights) == {1.0}:
            return dataset.fingerprint
        return sha256(json.dumps([dataset.fingerprint, self.weights]).encode()).hexdigest()


def preprocess_options(config: Config) -> PreprocessOptions:
    """What the run asks of its data."""
    return PreprocessOptions(
        tokenizer=str(
            local_path(config.data.tokenizer)
            if config.data.tokenizer
            else hf_directory(local_path(config.model.policy))
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
        lacking: From ``setup/model_inputs.py: check_tokenizers``.

    Raises:
        UserError: A file is bad, a pair does not fit a pack, or holds a token that some model's tokenizer lacks.
    """
    options = preprocess_options(config)
    opened = {name: open_sources(sources, options, str(cache_dir)) for name, sources in config.datasets.items()}
    for name, parts in opened.items():
        for dataset, weight in parts:
            key = f"data.{name.replace('/', '.')}"
            _log_summary(key if len(parts) == 1 else f"{key} ({Path(dataset.prefix).name})", dataset)
            check_pairs_fit(dataset, whole_packs(config), config.seq_length_multiple)
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


def _log_summary(name: str, dataset: PreferenceDataset) -> None:
    """Logs what became of a dataset's records; ``data_summary.json`` has the rest."""
    logger.info("%s", summary_line(name, dataset.manifest))
    truncated, limit = dataset.manifest["truncated"], dataset.manifest["options"]["max_length"]
    if (warning := lost_ends_warning(name, truncated, dataset.responses, limit)) is not None:
        logger.warning("%s", warning)


def write_summary(output_dir: Path, prepared: Mapping[str, Prepared]) -> None:
    """Leaves in the output directory what became of the records of each dataset, by name.

    Raises:
        UserError: It cannot be written; a StorageError where that may pass.
    """
    found = {}
    for name, each in prepared.items():
        parts = zip(each.prefixes, each.weights, strict=True)
        found[name] = [_summary_of(PreferenceDataset(prefix), weight) for prefix, weight in parts]
    write_atomically(output_dir / SUMMARY_FILE, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def _summary_of(dataset: PreferenceDataset, weight: float) -> dict[str, Any]:
    manifest, responses = dataset.manifest, dataset.responses
    cut, _ = lost_ends(manifest["truncated"], responses)
    found: dict[str, Any] = {"dataset": dataset.prefix, "sources": [source["path"] for source in manifest["sources"]]}
    found |= {"weight": weight, "responses": responses, "lost_ends": cut}
    return found | {key: manifest[key] for key in ("pairs", "dropped", "truncated", "lengths")}
