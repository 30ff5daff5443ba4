"""Turns files of preference pairs into a tokenised, memory-mapped dataset."""

import os
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_tgdpo import console
from megatron_tgdpo.data.encode import (
    EncodedBatch,
    RecordBatch,
    decode_record,
    encode_batch,
    encode_batch_in_worker,
    start_worker,
)
from megatron_tgdpo.data.fields import RawRecord
from megatron_tgdpo.data.layouts import detect_layout
from megatron_tgdpo.data.manifest import (
    DATA_SUFFIXES,
    FORMAT_VERSION,
    MANIFEST_SUFFIX,
    READING_VERSION,
    commit,
    digest_file,
    length_summary,
)
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.records import detect_format, read_records, where
from megatron_tgdpo.data.scored_layouts import is_scored_row, join_scored_rows
from megatron_tgdpo.data.sources import Source, find_files
from megatron_tgdpo.data.tokenizers import Tokenizer, load_tokenizer
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.signals import leave_if_requested
from megatron_tgdpo.storage.atomic_file import refuse_live, remove_stale, temporary_path
from megatron_tgdpo.storage.files import write_error

BATCH_RECORDS = 64
# Batches on their way per worker: enough to keep it busy, few enough that memory does not grow with the file.
BATCHES_IN_FLIGHT = 4
# A worker takes seconds to start; in less than that it tokenises so many bytes of text.
WORKER_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """An input file: path, format (json, jsonl, parquet, arrow), size in bytes and sha256 (hex)."""

    path: str
    kind: str
    size: int
    sha256: str


def inspect_sources(paths: Sequence[str]) -> list[SourceFile]:
    """Hashes the input files and tells their formats.

    Raises:
        UserError: there is none, or one is missing, empty or of no known format.
    """
    if not paths:
        raise UserError("no input file given")
    sources = []
    for path in paths:
        kind = detect_format(path)
        sources.append(SourceFile(path, kind, **asdict(digest_file(path))))
    return sources


def preprocess(
    paths: Sequence[str | Source],
    prefix: str,
    options: PreprocessOptions,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenises preference pairs into ``PREFIX.{bin,idx,source.npy,manifest.json}``.

    The result does not depend on ``options.workers``. Only token counts and record numbers stay in memory (about
    200 bytes a pair). With more than one worker, processes are spawned: call it under ``if __name__ == "__main__"``.
    One caller at a time; no collectives, no CUDA.

    Args:
        paths: raw files, directories and globs (`sources.find_files`), read in this order.
        prefix: where the dataset goes; its directory is created.
        options: tokenizer and length rules.
        overwrite: replace a complete dataset at ``prefix``.
        progress: say on stderr how far it is, as :func:`~megatron_tgdpo.console.progress` does.

    Returns:
        The manifest.

    Raises:
        UserError: bad input (names file and record), nothing left, or the output cannot be written. No manifest is
            left by a failed or interrupted run, and a dataset that was complete before stays as it was.
        StorageError: the output cannot be written for a reason that may pass, as a full disk.
        StoppedEarly: this process was asked to stop.
    """
    if not overwrite and os.path.exists(prefix + MANIFEST_SUFFIX):
        raise UserError(
            f"{prefix + MANIFEST_SUFFIX} exists: a dataset is there already; tgdpo preprocess --overwrite replaces it"
        )
    named = [Source(path) if isinstance(path, str) else path for path in paths]
    sources = inspect_sources([file for source in named for file in find_files(source)])
    tokenizer = load_tokenizer(options.tokenizer, options.chat_template, options.template_kwargs)
    return write_dataset(sources, prefix, options, tokenizer, progress)


@dataclass(frozen=True)
class Tried:
    """What :func:`try_first_records` found.

    Attributes:
        records: how many records were tokenised.
        lengths: int64 [pairs, 3], tokens of prompt, chosen and rejected of those that were not dropped.
        truncated: pairs by what was cut, as `EncodedBatch` has them.
    """

    records: int
    lengths: np.ndarray
    truncated: Counter[str]


def try_first_records(sources: Sequence[Source], options: PreprocessOptions) -> Tried:
    """Tokenises the first batch of each raw file, and keeps nothing.

    Raises:
        UserError: As :func:`preprocess`, as far as the first records show.
    """
    tokenizer = load_tokenizer(options.tokenizer, options.chat_template, options.template_kwargs)
    records, lengths, truncated = 0, [np.empty((0, 3), np.int64)], Counter[str]()
    for path in (file for source in sources for file in find_files(source)):
        # Nothing is recorded of the file, so it need not be hashed.
        first = next(_batches([SourceFile(path, detect_format(path), 0, "")], options), None)
        if first is None:
            raise UserError(f"{path}: it holds no record")
        encoded = encode_batch(first[1], tokenizer, options)
        records += len(first[1].numbers)
        lengths.append(encoded.lengths.astype(np.int64))
        truncated.update(encoded.truncated)
    return Tried(records, np.concatenate(lengths), truncated)


def write_dataset(
    sources: Sequence[SourceFile], prefix: str, options: PreprocessOptions, tokenizer: Tokenizer, progress: bool
) -> dict[str, Any]:
    """`preprocess` with the inputs already inspected and the tokenizer open; replaces what is at ``prefix``."""
    refuse_live(Path(prefix))
    staging = str(temporary_path(Path(prefix)))
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        Path(staging + ".bin").touch()
        remove_stale(Path(prefix), Path(staging + ".bin"))
        manifest = _fill(staging, sources, options, tokenizer, progress)
        commit(staging, prefix, manifest)
    except OSError as error:
        raise write_error(f"the dataset {prefix}", error) from error
    finally:
        for suffix in DATA_SUFFIXES:
            with suppress(OSError):
                os.unlink(staging + suffix)
    return manifest


@dataclass
class _Tally:
    """What writing the pairs has counted so far.

    ``origins`` holds, of each kept pair, file, record, and how many tokens of chosen and rejected are trained on; the
    rest are the manifest's sums.
    """

    origins: list[np.ndarray] = field(default_factory=list)
    untrained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    max_token_id: int = 0

    def add(self, file_index: int, result: EncodedBatch) -> None:
        origin = np.zeros((len(result.numbers), 4), np.int64)
        origin[:, 0], origin[:, 1] = file_index, result.numbers
        bounds = np.concatenate([[0], np.cumsum(result.lengths)])
        trained = np.concatenate([[0], np.cumsum(result.tokens >= 0)])
        origin[:, 2:] = np.diff(trained[bounds]).reshape(-1, 3)[:, 1:]
        self.untrained += int((result.tokens < 0).sum())
        self.origins.append(origin)
        self.dropped.update(result.dropped)
        self.truncated.update(result.truncated)
        ids = np.maximum(result.tokens, ~result.tokens)
        self.max_token_id = max(self.max_token_id, int(ids.max(initial=0)))


def _fill(
    staging: str, sources: Sequence[SourceFile], options: PreprocessOptions, tokenizer: Tokenizer, progress: bool
) -> dict[str, Any]:
    """Writes the data files under ``staging`` and returns the manifest."""
    builder = IndexedDatasetBuilder(staging + ".bin", dtype=np.int32)
    tally = _Tally()
    with (
        builder.data_file,
        closing(_encoded(sources, options, tokenizer)) as results,
        console.progress("tokenise", sum(source.size for source in sources), "B", shown=progress) as bar,
    ):
        for file_index, result, bytes_read in results:
            leave_if_requested("tokenising")
            start = 0
            for lengths in result.lengths.tolist():
                builder.add_document(result.tokens[start : start + sum(lengths)], lengths)
                start += sum(lengths)
            tally.add(file_index, result)
            bar.update(bytes_read - bar.n)
            bar.set_postfix(pairs=len(builder.document_indices) - 1, dropped=sum(tally.dropped.values()), refresh=False)
    if not builder.sequence_lengths:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in tally.dropped.items()) or "there was none"
        raise UserError(f"{', '.join(source.path for source in sources)}: no pair is left ({reasons})")
    builder.finalize(staging + ".idx")
    origins = np.concatenate(tally.origins)
    np.save(staging + ".source.npy", origins if tally.untrained else origins[:, :2], allow_pickle=False)
    lengths = np.array(builder.sequence_lengths, dtype=np.int64).reshape(-1, 3)
    return _manifest(staging, lengths, tally, sources, options, tokenizer)


def _manifest(
    staging: str,
    lengths: np.ndarray,
    tally: _Tally,
    sources: Sequence[SourceFile],
    options: PreprocessOptions,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "reading_version": READING_VERSION,
        "pairs": len(lengths),
        "responses": int(np.count_nonzero(lengths[:, 1:])),
        "dropped": dict(sorted(tally.dropped.items())),
        "truncated": dict(sorted(tally.truncated.items())),
        "lengths": length_summary(lengths),
        "tokenizer": {
            "path": options.tokenizer,
            "fingerprint": tokenizer.fingerprint,
            "ids_fingerprint": tokenizer.ids_fingerprint,
            "adds_bos": tokenizer.adds_bos,
            "template_fingerprint": tokenizer.template_fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        "max_token_id": tally.max_token_id,
        "untrained_tokens": tally.untrained,
        "options": {
            **options.length_rules(),
            "chat_template": options.chat_template,
            "template_kwargs": dict(options.template_kwargs),
            "columns": dict(options.columns),
            "strict": options.strict,
            "chosen_only": options.chosen_only,
        },
        "sources": [asdict(source) for source in sources],
        "files": {suffix: asdict(digest_file(staging + suffix)) for suffix in DATA_SUFFIXES},
    }


def _encoded(
    sources: Sequence[SourceFile], options: PreprocessOptions, tokenizer: Tokenizer
) -> Generator[tuple[int, EncodedBatch, int], None, None]:
    """Yields (index of the file, encoded batch, bytes read of all files) in the order of the input."""
    batches = _batches(sources, options)
    workers = min(options.workers, 1 + sum(source.size for source in sources) // WORKER_BYTES)
    if workers == 1:
        for file_index, batch, bytes_read in batches:
            yield file_index, encode_batch(batch, tokenizer, options), bytes_read
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)
    waiting: deque[tuple[int, Future[EncodedBatch], int]] = deque()
    try:
        for file_index, batch, bytes_read in batches:
            waiting.append((file_index, pool.submit(encode_batch_in_worker, batch, options), bytes_read))
            if len(waiting) >= workers * BATCHES_IN_FLIGHT:
                yield _oldest(waiting)
        while waiting:
            yield _oldest(waiting)
    except BrokenProcessPool as error:
        # The signal may have reached a worker that did not yet ignore it.
        leave_if_requested("tokenising")
        raise UserError(
            "a preprocessing worker died (killed, or out of memory?); try fewer workers, and start it from a script "
            'guarded by if __name__ == "__main__"'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _oldest(waiting: deque[tuple[int, Future[EncodedBatch], int]]) -> tuple[int, EncodedBatch, int]:
    file_index, future, bytes_read = waiting.popleft()
    return file_index, future.result(), bytes_read


def _batches(sources: Sequence[SourceFile], options: PreprocessOptions) -> Iterator[tuple[int, RecordBatch, int]]:
    """Yields (index of the file, batch, bytes read of all files)."""
    bytes_before = 0
    for file_index, source in enumerate(sources):
        records = _joined(source, read_records(source.path, source.kind, options.columns.values()), options)
        layout = ""
        while batch := list(islice(records, BATCH_RECORDS)):
            layout = layout or _layout_of(source, batch[0], options)
            numbers, payloads = tuple(record.number for record in batch), tuple(record.payload for record in batch)
            bytes_read = bytes_before + batch[-1].bytes_read
            yield file_index, RecordBatch(source.path, source.kind, layout, numbers, payloads), bytes_read
        bytes_before += source.size


def _joined(source: SourceFile, records: Iterator[RawRecord], options: PreprocessOptions) -> Iterator[RawRecord]:
    """The records of a file; those of one answer each joined, where the first is such a one."""
    first = next(records, None)
    if first is None:
        return iter(())
    together = chain([first], records)

    def decode(raw: RawRecord) -> Any:
        return decode_record(raw.payload, source.kind, where(source.path, source.kind, raw.number), options)

    return join_scored_rows(together, source.kind, decode) if is_scored_row(decode(first)) else together


def _layout_of(source: SourceFile, record: RawRecord, options: PreprocessOptions) -> str:
    place = where(source.path, source.kind, record.number)
    payload = decode_record(record.payload, source.kind, place, options)
    return detect_layout(payload, place, chosen_only=options.chosen_only)
