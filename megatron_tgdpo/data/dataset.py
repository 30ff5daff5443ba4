"""Random access to preprocessed preference pairs, and the way from a path in a configuration to them."""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_tgdpo.data.manifest import (
    DATA_SUFFIXES,
    FORMAT_VERSION,
    MANIFEST_SUFFIX,
    READING_VERSION,
    content_fingerprint,
    digest_file,
    read_manifest,
)
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.records import where
from megatron_tgdpo.data.sources import Source, find_files
from megatron_tgdpo.data.tokenizers import Tokenizer, load_tokenizer
from megatron_tgdpo.data.truncation import REASONS_OF_PAIRS
from megatron_tgdpo.errors import StorageError, UserError
from megatron_tgdpo.storage.files import read_error

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreferencePair:
    """One tokenised pair.

    Attributes:
        prompt: int64 [tokens], shared by both responses.
        chosen: int64 [tokens], the preferred response, with its end-of-turn token unless truncated.
        rejected: int64 [tokens], the other one; empty where a prompt has a single answer.
        index: the pair's place in the dataset.
        chosen_trained: bool [tokens], which of them are trained on; None for all.
        rejected_trained: same, of the other.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    index: int
    chosen_trained: np.ndarray | None = None
    rejected_trained: np.ndarray | None = None

    @property
    def trained(self) -> np.ndarray:
        """bool [chosen + rejected tokens], which of them are trained on."""
        responses = ((self.chosen, self.chosen_trained), (self.rejected, self.rejected_trained))
        return np.concatenate([np.ones(len(ids), bool) if kept is None else kept for ids, kept in responses])

    @property
    def trained_lengths(self) -> tuple[int, int]:
        """Tokens of chosen and of rejected that are trained on."""
        chosen = self.trained[: len(self.chosen)]
        return int(chosen.sum()), int(self.trained.sum() - chosen.sum())


class PreferenceDataset:
    """A preprocessed dataset, memory mapped. Opening it reads the index, not the tokens; any process may.

    Attributes:
        prefix: its path without suffix.
        manifest: the content of its manifest.
        fingerprint: sha256 (hex) naming its tokens and their division into pairs.
        ids_fingerprint: of the tokenizer that made its ids (`Tokenizer.ids_fingerprint`; of datasets made before there
            was that, `Tokenizer.fingerprint`).
        lengths: int64 [N, 3], tokens of prompt, chosen and rejected.
        trained_lengths: int64 [N, 3], the same, of chosen and rejected only those that are trained on.
        origin: int64 [N, 2], source file (its place in the manifest) and record number of each pair.

    Raises:
        UserError: the manifest is missing (an incomplete dataset), a file is truncated or missing, or files and
            manifest contradict each other.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.manifest: dict[str, Any] = read_manifest(prefix)
        self.fingerprint = content_fingerprint(self.manifest)
        made_with = self.manifest["tokenizer"]
        self.ids_fingerprint: str = made_with.get("ids_fingerprint", made_with["fingerprint"])
        self._vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        if self.manifest["max_token_id"] >= self._vocab_size:
            raise UserError(
                f"{prefix}: holds token id {self.manifest['max_token_id']}, above its tokenizer's {self._vocab_size} "
                "entries; preprocess again"
            )
        try:
            self._sequences = IndexedDataset(prefix)
            self.origin = np.load(prefix + ".source.npy", mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise read_error(prefix, error) from error
        except (AssertionError, ValueError, KeyError) as error:
            raise UserError(f"{prefix}: the index is damaged ({error}); preprocess again") from error
        pairs = self.manifest["pairs"]
        sources = len(self.manifest["sources"])
        masked = bool(self.manifest.get("untrained_tokens"))
        if (
            len(self._sequences) != 3 * pairs
            or self.origin.shape != (pairs, 4 if masked else 2)
            or not 0 <= self.origin[:, 0].max(initial=0) < max(sources, 1)
        ):
            raise UserError(f"{prefix}: the index does not hold the manifest's {pairs} pairs; preprocess again")
        self.lengths = self._sequences.sequence_lengths.astype(np.int64).reshape(-1, 3)
        self.trained_lengths = np.hstack([self.lengths[:, :1], self.origin[:, 2:]]) if masked else self.lengths
        self.origin = self.origin[:, :2]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> PreferencePair:
        """Reads one pair.

        Raises:
            IndexError: ``index`` is not in [0, N).
            UserError: a token id is outside the vocabulary: the .bin file is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        prompt, *responses = (self._sequence(index, column) for column in range(3))
        # ~id is a token of a response that is not trained on.
        trained = [ids >= 0 for ids in responses]
        chosen, rejected = (np.maximum(ids, ~ids) for ids in responses)
        for ids in (prompt, chosen, rejected):
            if ids.min(initial=0) < 0 or ids.max(initial=0) >= self._vocab_size:
                raise UserError(
                    f"{self.prefix}.bin: the pair {self.source(index)} holds a token id outside the vocabulary "
                    f"of {self._vocab_size}: the file is damaged; preprocess again"
                )
        masks = [None if kept.all() else kept for kept in trained]
        if [int(kept.sum()) for kept in trained] != self.trained_lengths[index, 1:].tolist():
            raise UserError(f"{self.prefix}.bin: the pair {self.source(index)} is damaged; preprocess again")
        return PreferencePair(prompt, chosen, rejected, int(index), *masks)

    def _sequence(self, index: int, column: int) -> np.ndarray:
        if not self.lengths[index, column]:
            return np.empty(0, np.int64)
        result: np.ndarray = self._sequences[3 * index + column].astype(np.int64)
        return result

    def source(self, index: int) -> str:
        """Where a pair came from, as in error messages: ``pairs.jsonl:17`` or ``pairs.json record 17``."""
        file_index, number = self.origin[index]
        source = self.manifest["sources"][file_index]
        return where(source["path"], source["kind"], int(number))

    def first_use(self, ids: Collection[int]) -> tuple[int, int] | None:
        """Finds the first token that is one of ``ids``, reading all: (index of the pair, id); None if there is none."""
        wanted = np.array([number for number in ids if number <= self.manifest["max_token_id"]], dtype=np.int64)
        for index in range(len(self) if len(wanted) else 0):
            for column in range(3):
                tokens = self._sequence(index, column)
                (found,) = np.nonzero(np.isin(tokens, wanted))
                if len(found):
                    return index, int(tokens[found[0]])
        return None

    def require_pairs(self) -> None:
        """Checks that every prompt has two responses.

        Raises:
            UserError: one has a single answer; names it.
        """
        (single,) = np.nonzero(self.lengths[:, 2] == 0)
        if len(single):
            raise UserError(
                f"{self.source(int(single[0]))}: a prompt with a single answer, and a pair is needed ({len(single)} of "
                f"{len(self)} records are like that): only loss.method sft trains on single answers"
            )

    @property
    def responses(self) -> int:
        """Two a pair, one of a single answer."""
        return int(np.count_nonzero(self.lengths[:, 1:]))

    @property
    def files(self) -> list[str]:
        """Paths of the data files."""
        return [self.prefix + suffix for suffix in DATA_SUFFIXES]

    def verify(self, digests: Mapping[str, str] | None = None) -> None:
        """Compares the data files with the manifest.

        Args:
            digests: sha256 (hex) of :attr:`files`, by absolute path; None to read the files whole for it.

        Raises:
            UserError: a file is not what was written.
        """
        for suffix in DATA_SUFFIXES:
            path = self.prefix + suffix
            found = digest_file(path).sha256 if digests is None else digests[os.path.abspath(path)]
            if found != self.manifest["files"][suffix]["sha256"]:
                raise UserError(f"{path} is damaged: its sha256 is not the manifest's; preprocess again")


def open_or_preprocess(
    path: str | Sequence[str | Source],
    options: PreprocessOptions,
    cache_dir: str,
    *,
    progress: bool = True,
) -> PreferenceDataset:
    """Opens a dataset, preprocessing raw files once where need be.

    Call it on one rank before process groups exist (preprocessing may take longer than their time-out); the other
    ranks open what it returns with ``PreferenceDataset(dataset.prefix)``. Runs no collectives.

    Args:
        path: a dataset's prefix or manifest, or raw files, directories and globs (`sources.find_files`).
        options: what training asks of the data.
        cache_dir: where datasets made from raw files are kept, named by content of files, tokenizer and options.
        progress: say on stderr how far it is, as :func:`~megatron_tgdpo.console.progress` does.

    Raises:
        UserError: bad input, or the dataset was made with another tokenizer, template or length limit, or lacks the
            rejected responses that are asked for.
    """
    entries = [path] if isinstance(path, str) else path
    sources = [Source(entry) if isinstance(entry, str) else entry for entry in entries]
    prepared = [prefix for prefix in (prepared_prefix(source.path) for source in sources) if prefix]
    if prepared and len(sources) > 1:
        raise UserError(f"{prepared[0]} is a preprocessed dataset: give it alone, or give raw files only")
    if prepared:
        dataset = PreferenceDataset(prepared[0])
        _check_match(dataset, options, _tokenizer(options))
    else:
        files = [file for source in sources for file in find_files(source)]
        dataset = _cached(files, options, cache_dir, progress)
    if not options.chosen_only:
        dataset.require_pairs()
    return dataset


def prepared_prefix(path: str) -> str | None:
    """The dataset prefix that ``path`` means, None if it is a raw file."""
    if path.endswith(MANIFEST_SUFFIX):
        return path.removesuffix(MANIFEST_SUFFIX)
    if Path(path).is_file() and not path.endswith((".bin", ".idx")):
        return None
    prefix = path.removesuffix(".bin").removesuffix(".idx")
    if any(Path(prefix + suffix).exists() for suffix in (MANIFEST_SUFFIX, ".bin", ".idx")):
        return prefix
    return None


def _check_match(dataset: PreferenceDataset, options: PreprocessOptions, tokenizer: Tokenizer) -> None:
    made_with = dataset.manifest["tokenizer"]
    if _same_ids(made_with, tokenizer):
        made_with = {**made_with, "fingerprint": tokenizer.fingerprint}
    for key, name, asked in (
        ("fingerprint", "tokenizer", tokenizer.fingerprint),
        ("template_fingerprint", "chat template or template_kwargs", tokenizer.template_fingerprint),
    ):
        if made_with[key] != asked:
            raise UserError(
                f"{dataset.prefix} was made with another {name} ({made_with['path']}, {made_with[key][:12]}) than "
                f"{options.tokenizer} ({asked[:12]}): preprocess again with this one"
            )
    for key, wanted in options.length_rules().items():
        found = dataset.manifest["options"][key]
        if found != wanted:
            raise UserError(
                f"{dataset.prefix} was made with {key}={found} and training asks for {wanted}: preprocess again, or "
                f"set data.{key} to {found}"
            )
    if options.chosen_only and _rejected_decided(dataset):
        raise UserError(
            f"{dataset.prefix} was made for pairs, and its rejected responses decided what else was cut or dropped "
            f"(cut: {_counts(dataset.manifest['truncated'])}; dropped: {_counts(dataset.manifest['dropped'])}): "
            "make it again with tgdpo preprocess --chosen-only for loss.method sft"
        )
    if not options.chosen_only and dataset.manifest["options"].get("chosen_only"):
        raise UserError(
            f"{dataset.prefix} was made without rejected responses and training asks for pairs: make it again "
            "with tgdpo preprocess without --chosen-only"
        )
    dropped = dataset.manifest["dropped"]
    if options.strict and dropped:
        raise UserError(
            f"{dataset.prefix} was made by dropping pairs ({_counts(dropped)}) and strict is on: mend the source"
        )
    if dataset.manifest.get("reading_version", 1) != READING_VERSION:
        logger.warning(
            "%s was made by another version, which reads some records otherwise: preprocess again, unless docs/data.md "
            "says that it may stay",
            dataset.prefix,
        )


def _same_ids(made_with: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer gives the ids of the one that a manifest describes, BOS and EOS too."""
    names = ("ids_fingerprint", "bos_id", "eos_id", "adds_bos")
    return [made_with.get(name) for name in names] == [getattr(tokenizer, name) for name in names]


def _rejected_decided(dataset: PreferenceDataset) -> bool:
    """Whether prompts and chosen responses may be others than they would be without the rejected ones.

    They are not where no prompt and no chosen response was cut, and none was dropped for what its pair was.
    """
    manifest = dataset.manifest
    if manifest["options"].get("chosen_only"):
        return False
    # A file holds pairs or single answers, never both.
    files = np.unique(dataset.origin[:, 0])
    if len(files) == len(manifest["sources"]) and not dataset.lengths[:, 2].any():
        return False
    cut, dropped = manifest["truncated"], manifest["dropped"]
    return any(cut.get(part) for part in ("prompt", "chosen")) or any(dropped.get(why) for why in REASONS_OF_PAIRS)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items()) or "nothing"


def _cached(paths: list[str], options: PreprocessOptions, cache_dir: str, progress: bool) -> PreferenceDataset:
    from megatron_tgdpo.data.preprocess import inspect_sources, write_dataset

    sources = inspect_sources(paths)
    tokenizer = _tokenizer(options)
    key = {
        "format_version": FORMAT_VERSION,
        "reading_version": READING_VERSION,
        # Names are part of it, because errors quote them from the manifest.
        "sources": [(source.path, source.size, source.sha256) for source in sources],
        "tokenizer": [tokenizer.fingerprint, tokenizer.template_fingerprint],
        "options": options.length_rules(),
    }
    if options.columns:
        key["columns"] = dict(options.columns)
    stem = Path(cache_dir) / Path(paths[0]).stem
    # Without rejected responses, one made for pairs serves too where they decided nothing.
    keys = [{**key, "chosen_only": True}, key] if options.chosen_only else [key]
    prefixes = [f"{stem}-{_short_digest(each)}" for each in keys]
    for prefix in prefixes:
        if not Path(prefix + MANIFEST_SUFFIX).exists():
            continue
        try:
            dataset = PreferenceDataset(prefix)
        except StorageError:
            raise  # what could not be read is not to be replaced
        except UserError as error:
            logger.warning("making the cached dataset again: %s", error)
            continue
        if options.chosen_only and _rejected_decided(dataset):
            continue
        _check_match(dataset, options, tokenizer)
        return dataset
    write_dataset(sources, prefixes[0], options, tokenizer, progress)
    return PreferenceDataset(prefixes[0])


def _tokenizer(options: PreprocessOptions) -> Tokenizer:
    return load_tokenizer(options.tokenizer, options.chat_template, options.template_kwargs)


def _short_digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
