"""The manifest of a preprocessed dataset: what is in it, and the proof that it was written to its end.

A dataset is ``PREFIX.bin`` and ``PREFIX.idx`` (Megatron-Core IndexedDataset), ``PREFIX.source.npy`` and
``PREFIX.manifest.json``. The manifest is put in place last: without it there is no dataset.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.atomic_file import replacing
from megatron_tgdpo.storage.files import FileDigest, file_digest, read_error, sync
from megatron_tgdpo.storage.json_text import check_shape, parse_json

FORMAT_VERSION = 1
# Raised whenever some record gets other tokens than before: what training itself made of raw files is then made anew.
READING_VERSION = 2
MANIFEST_SUFFIX = ".manifest.json"
DATA_SUFFIXES = (".bin", ".idx", ".source.npy")
# What is read of a manifest.
_SHAPE = {
    "files": {suffix: {"size": int, "sha256": str} for suffix in DATA_SUFFIXES},
    "pairs": int,
    "dropped": dict,
    "truncated": object,
    "lengths": object,
    "tokenizer": {"path": str, "fingerprint": str, "template_fingerprint": str, "vocab_size": int},
    "max_token_id": int,
    "options": {"max_length": object, "max_prompt_length": object, "overlong_prompt": object},
    "sources": [{"path": str, "kind": str}],
}
REQUIRED_KEYS = ("files", "pairs", "dropped", "truncated", "lengths", "tokenizer", "max_token_id", "options", "sources")


def digest_file(path: str) -> FileDigest:
    """Hashes a file in blocks.

    Raises:
        UserError: it is not there.
        StorageError: it cannot be read.
    """
    try:
        return file_digest(Path(path))
    except OSError as error:
        raise read_error(path, error) from error


def commit(staging_prefix: str, prefix: str, manifest: Mapping[str, Any]) -> None:
    """Renames finished data files into place, then writes the manifest; an older manifest goes first.

    At every instant the files under ``prefix`` are either a complete dataset or lack a manifest.

    Args:
        staging_prefix: where the data files were written, on the same file system.
        prefix: the dataset's prefix.
        manifest: the manifest's content.

    Raises:
        UserError: another process wrote a dataset there at the same time.
    """
    for suffix in DATA_SUFFIXES:
        sync(Path(staging_prefix + suffix))
    ours = {suffix: os.stat(staging_prefix + suffix).st_ino for suffix in DATA_SUFFIXES}
    manifest_file = Path(prefix + MANIFEST_SUFFIX)
    with replacing(manifest_file) as staged_manifest:
        staged_manifest.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        manifest_file.unlink(missing_ok=True)
        for suffix in DATA_SUFFIXES:
            os.replace(staging_prefix + suffix, prefix + suffix)
        sync(manifest_file.parent)
        _check_own(prefix, ours)
        ours[MANIFEST_SUFFIX] = staged_manifest.stat().st_ino
    _check_own(prefix, ours)


def _check_own(prefix: str, inodes: Mapping[str, int]) -> None:
    """Checks that the files are those that this process put there: of two at a time, each may have put some."""
    for suffix, inode in inodes.items():
        try:
            own = os.stat(prefix + suffix).st_ino == inode
        except FileNotFoundError:
            own = False
        if not own:
            raise UserError(
                f"{prefix + suffix}: another process writes the same dataset: preprocess again when it has ended"
            )


def read_manifest(prefix: str) -> dict[str, Any]:
    """Reads and checks ``PREFIX.manifest.json``, and the data files' sizes against it.

    Raises:
        UserError: it is missing (the dataset is incomplete), malformed, of another version, or a data file is
            missing or has another size than recorded.
        StorageError: a file cannot be read.
    """
    path = prefix + MANIFEST_SUFFIX
    try:
        manifest = parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: the dataset {prefix} does not exist or is incomplete; preprocess again"
        ) from error
    except OSError as error:
        raise read_error(path, error) from error
    except ValueError as error:
        raise UserError(f"{path}: cannot read the manifest ({error}); preprocess again") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: not a version {FORMAT_VERSION} manifest; preprocess again")
    lacking = [key for key in REQUIRED_KEYS if key not in manifest]
    if lacking:
        raise UserError(f"{path}: the manifest lacks '{lacking[0]}'; preprocess again")
    try:
        check_shape(manifest, _SHAPE, "the manifest")
    except TypeError as error:
        raise UserError(f"{path}: {error}; preprocess again") from error
    for suffix in DATA_SUFFIXES:
        recorded = manifest["files"][suffix]["size"]
        try:
            size = os.stat(prefix + suffix).st_size
        except FileNotFoundError as error:
            raise UserError(f"{prefix + suffix} is missing; preprocess again") from error
        except OSError as error:
            raise read_error(prefix + suffix, error) from error
        if size != recorded:
            raise UserError(
                f"{prefix + suffix} has {size} bytes and the manifest says {recorded}: truncated or replaced; "
                "preprocess again"
            )
    return manifest


def content_fingerprint(manifest: Mapping[str, Any]) -> str:
    """sha256 (hex) that names a dataset's tokens and their division into pairs."""
    files = manifest["files"]
    return hashlib.sha256(f"{files['.bin']['sha256']}{files['.idx']['sha256']}".encode()).hexdigest()


def length_summary(lengths: np.ndarray) -> dict[str, dict[str, Any]]:
    """Distribution of token counts.

    Args:
        lengths: int64 [N, 3], tokens of prompt, chosen and rejected; N > 0.

    Returns:
        For prompt, chosen, rejected and pair (what a pair takes in a row: the prompt with each response) min, mean,
        median, p95, max and total in tokens, and ``histogram``: pairs by the smallest power of two that is not below
        their length.
    """
    prompt, chosen, rejected = lengths.T
    pair = prompt + chosen + np.where(rejected, prompt + rejected, 0)
    columns = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "pair": pair}
    return {name: _column_summary(values) for name, values in columns.items()}


def _column_summary(values: np.ndarray) -> dict[str, Any]:
    exponents = np.ceil(np.log2(np.maximum(values, 1))).astype(np.int64)
    bounds, counts = np.unique(2**exponents, return_counts=True)
    return {
        "min": int(values.min()),
        "mean": round(float(values.mean()), 2),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": int(values.max()),
        "total": int(values.sum()),
        "histogram": {str(bound): int(count) for bound, count in zip(bounds, counts, strict=True)},
    }
