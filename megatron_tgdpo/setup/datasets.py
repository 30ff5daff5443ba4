"""A run's datasets: prepared once, opened on every rank, and what became of their records."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from megatron_tgdpo.batching.packer import check_pairs_fit
from megatron_tgdpo.batching.sampler import DatasetPart
from megatron_tgdpo.checkpoints.model_directory import hf_directory
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.data.dataset import PreferenceDataset, prepared_prefix
from megatron_tgdpo.data.joined import join, open_sources
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.records import detect_format, read_records
from megatron_tgdpo.data.sources import find_files
from megatron_tgdpo.data.summary import lost_ends, lost_ends_warning, summary
from megatron_tgdpo.data.tokenizer_compatibility import LackingTokens
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.output.directory import SUMMARY_FILE
from megatron_tgdpo.setup.layout import whole_packs
from megatron_tgdpo.storage.atomic_file import write_atomically
from megatron_tgdpo.storage.hub import local_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counted:
    """``data.train`` as far as it is known before any record is tokenised.

    Attributes:
        parts: Pairs and weight of each dataset or raw file; of a file, records are counted.
        tokens: Mean tokens of a pair, both its sequences together, and the part of them that is response; None unless
            all of the data is preprocessed.
    """

    parts: list[DatasetPart]
    tokens: tuple[float, float] | None


def count_training_data(config: Config) -> Counted:
    """Counts the pairs of a run, for a dry run; raw files are read, and nothing is kept.

    Raises:
        UserError: A file is not there, or malformed; a StorageError where it cannot be read.
    """
    parts, lengths = [], []
    for source in config.datasets["train"]:
        prefix = prepared_prefix(source.path)
        if prefix is not None:
            lengths.append(PreferenceDataset(prefix).lengths)
            pairs = len(lengths[-1])
        else:
            pairs = sum(1 for file in find_files(source) for _ in read_records(file, detect_format(file)))
        parts.append(DatasetPart(pairs, source.weight))
    if len(lengths) < len(parts):
        return Counted(parts, None)
    weights = [part.weight for part in parts]
    prompt, *responses = sum(each.sum(axis=0) * weight for each, weight in zip(lengths, weights, strict=True))
    # One response, or two behind a prompt each.
    answers = responses[:1] if config.method.chosen_only else responses
    total = len(answers) * prompt + sum(answers)
    taken = math.fsum(part.pairs * part.weight for part in parts)
    return Counted(parts, (total / taken, sum(answers) / total))


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
            _log_summary(f"data.{name.replace('/', '.')}: {dataset.prefix}", dataset)
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
    """Logs what became of a dataset's records."""
    for line in summary(name, dataset.manifest).splitlines():
        logger.info("%s", line)
    if (warning := lost_ends_warning(name, dataset.manifest, dataset.responses)) is not None:
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
    cut, _ = lost_ends(manifest, responses)
    found: dict[str, Any] = {"dataset": dataset.prefix, "sources": [source["path"] for source in manifest["sources"]]}
    found |= {"weight": weight, "responses": responses, "lost_ends": cut}
    return found | {key: manifest[key] for key in ("pairs", "dropped", "truncated", "lengths")}
