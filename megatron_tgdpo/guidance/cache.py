"""Token log-probs of the frozen models, computed once and read from memory-mapped files in every later step.

    CACHE/manifest.json               written last: what the cache is of, and its shards
    CACHE/shard-00000.safetensors     pairs [0, block): ``reference`` and, with a guide, ``guide``, [tokens] float32

The tokens of a shard are the response tokens that are trained on of its pairs, chosen then rejected, pair after pair.
Each shard names the key of the cache and carries a checksum, so that an interrupted computation can tell whole shards
from others.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save_file

from megatron_tgdpo.config.schema import Config, GuidanceConfig
from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.errors import StorageError, UserError
from megatron_tgdpo.gpu.fp8 import frozen_precision
from megatron_tgdpo.loss.methods import Method
from megatron_tgdpo.setup.model_sources import model_sources
from megatron_tgdpo.storage.atomic_file import replacing, write_atomically
from megatron_tgdpo.storage.files import read_error
from megatron_tgdpo.storage.json_text import parse_json

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
_AGAIN = "run tgdpo guidance again"
_THREADS = 8


@dataclass(frozen=True)
class GuidanceKey:
    """What the values of a cache follow from; a cache serves nothing that differs in any of it.

    Attributes:
        data: Of the token ids and their division into pairs.
        tokenizer: Of the tokenizer that made them.
        template: Of the chat template.
        reference: Of the reference's weights and config.
        guide: Of the guide's; None without one.
        dtype: ``precision.dtype`` that the models ran in.
        unit: ``guidance.unit``: whether the guide's log-ratios are those of tokens, or means over sentences.
    """

    data: str
    tokenizer: str
    template: str
    reference: str
    guide: str | None
    dtype: str
    unit: str = "token"

    @property
    def digest(self) -> str:
        values = asdict(self)
        if self.unit == "token":
            # As in caches that know no other.
            del values["unit"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def model_fingerprints(config: Config, digests: Mapping[str, str]) -> tuple[str, str | None]:
    """Fingerprints of reference and guide; ``digests`` of their files: see ``setup/fingerprints.py: hash_files``."""
    sources = model_sources(config)
    guide = sources.get("guide")
    return sources["reference"].fingerprint(digests), None if guide is None else guide.fingerprint(digests)


def guidance_key(config: Config, dataset: PreferenceDataset, models: tuple[str, str | None]) -> GuidanceKey:
    """The key of a run's cache of a dataset; ``models`` is from :func:`model_fingerprints`."""
    made_with = dataset.manifest["tokenizer"]
    return GuidanceKey(
        dataset.fingerprint,
        dataset.ids_fingerprint,
        made_with["template_fingerprint"],
        *models,
        frozen_precision(config),
        config.guidance.unit,
    )


@dataclass(frozen=True)
class Shards:
    """How a dataset's pairs lie in shards.

    Attributes:
        lengths: [N, 3] int64, prompt, chosen and rejected tokens of each pair, of the responses those trained on.
        block_pairs: Pairs of a shard; the last may have fewer.
    """

    lengths: np.ndarray
    block_pairs: int

    @property
    def count(self) -> int:
        return -(-len(self.lengths) // self.block_pairs)

    def pairs(self, shard: int) -> range:
        """Dataset indices of a shard's pairs."""
        return range(shard * self.block_pairs, min((shard + 1) * self.block_pairs, len(self.lengths)))

    def offsets(self, shard: int) -> np.ndarray:
        """[pairs + 1] int64, where each pair's tokens begin in the shard, and the shard's tokens last."""
        pairs = self.pairs(shard)
        tokens = self.lengths[pairs.start : pairs.stop, 1:].sum(axis=1)
        return np.concatenate([[0], np.cumsum(tokens)])


def shard_path(directory: Path, shard: int) -> Path:
    return directory / f"shard-{shard:05d}.safetensors"


def write_shard(directory: Path, shard: int, key: GuidanceKey, values: Mapping[str, np.ndarray]) -> None:
    """Writes one shard so that it is there whole or not at all.

    Args:
        directory: Of the cache.
        shard: Its number.
        key: Of the cache.
        values: ``reference`` and perhaps ``guide``, [tokens] float32 each.

    Raises:
        UserError: The disk is full, or the directory cannot be written.
    """
    path = shard_path(directory, shard)
    try:
        with replacing(path) as temporary:
            save_file(dict(values), temporary, {"key": key.digest, "shard": str(shard), "sha256": _digest(values)})
    except (OSError, SafetensorError) as error:
        kind = StorageError if isinstance(error, OSError) else UserError
        raise kind(f"{path}: cannot write the shard: {error}; make room and start again, it continues") from error


def read_whole_shard(directory: Path, shard: int, key: GuidanceKey, tokens: int) -> str | None:
    """The checksum of a shard whose every byte is as written, for this key and of this many tokens; None if not so.

    Raises:
        StorageError: It cannot be read, which says nothing of its bytes.
    """
    names = ["reference"] if key.guide is None else ["guide", "reference"]
    try:
        # The library maps files into memory, and says of any that it cannot open that it is not there.
        content = shard_path(directory, shard).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise read_error(shard_path(directory, shard), error) from error
    try:
        values, stated = load(content), _stated(content)
    except (SafetensorError, ValueError, AttributeError):
        return None
    found = sorted(values)
    as_written = {"key": key.digest, "shard": str(shard), "sha256": _digest(values)}
    whole = stated == as_written and found == names and all(v.shape == (tokens,) for v in values.values())
    return as_written["sha256"] if whole else None


def _stated(content: bytes) -> dict[str, str]:
    """The metadata in the header of a safetensors file: 8 bytes of length (little-endian), then JSON."""
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    result: dict[str, str] = header.get("__metadata__", {})
    return result


def _digest(values: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(f"{name} {values[name].dtype} {values[name].shape}".encode())
        digest.update(np.ascontiguousarray(values[name]).data)
    return digest.hexdigest()


def whole_shards(
    directory: Path, key: GuidanceKey, shards: Shards, numbers: Sequence[int] | None = None
) -> dict[int, str]:
    """Checksums of the shards that need not be computed again, by number; reads all, or ``numbers``."""
    numbers = range(shards.count) if numbers is None else numbers

    def read(shard: int) -> str | None:
        return read_whole_shard(directory, shard, key, int(shards.offsets(shard)[-1]))

    with ThreadPoolExecutor(_THREADS) as pool:
        found = zip(numbers, pool.map(read, numbers), strict=True)
        return {shard: checksum for shard, checksum in found if checksum is not None}


def write_manifest(directory: Path, key: GuidanceKey, shards: Shards) -> None:
    """Declares a cache complete, after reading every shard back.

    Raises:
        UserError: A shard is missing or damaged.
    """
    checksums = whole_shards(directory, key, shards)
    missing = sorted(set(range(shards.count)) - checksums.keys())
    if missing:
        raise UserError(f"{shard_path(directory, missing[0])}: missing or damaged: {_AGAIN}")
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": asdict(key),
        "pairs": len(shards.lengths),
        "block_pairs": shards.block_pairs,
        "shards": [checksums[shard] for shard in range(shards.count)],
    }
    write_atomically(directory / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")


class GuidanceCache:
    """A complete cache of one dataset, memory mapped; any process may open it.

    Args:
        directory: Of the cache.
        lengths: [N, 3] int64 ``trained_lengths`` of the dataset that it is of.
        use_guide: Whether the guide's values are wanted; a cache made for TGDPO serves DPO too.

    Raises:
        UserError: There is no complete cache, or it is of other pairs, or has no guide's values where they are wanted.
    """

    def __init__(self, directory: Path, lengths: np.ndarray, *, use_guide: bool) -> None:
        manifest = _read_manifest(directory)
        if manifest["pairs"] != len(lengths):
            raise UserError(f"{directory}: of {manifest['pairs']} pairs, the dataset has {len(lengths)}: {_AGAIN}")
        self.directory = directory
        self.key = GuidanceKey(**manifest["key"])
        if use_guide and self.key.guide is None:
            raise UserError(f"{directory}: made without a guide, whose values this loss.method needs: {_AGAIN}")
        self.guided = use_guide
        self.shards = Shards(lengths, manifest["block_pairs"])
        self._checksums: list[str] = manifest["shards"]
        self._open: dict[int, tuple[Any, np.ndarray]] = {}

    def logps(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Token log-probs of a pair under the reference and the guide.

        Returns:
            [chosen + rejected tokens] float32 each; None for the guide's unless ``guided``.
        """
        shard, place = divmod(index, self.shards.block_pairs)
        if shard not in self._open:
            file = safe_open(shard_path(self.directory, shard), framework="np")
            self._open[shard] = file, self.shards.offsets(shard)
        file, offsets = self._open[shard]
        part = slice(int(offsets[place]), int(offsets[place + 1]))
        return file.get_slice("reference")[part], file.get_slice("guide")[part] if self.guided else None

    def check_key(self, key: GuidanceKey) -> None:
        """Compares with what a run needs.

        Raises:
            UserError: They differ; the message says in what.
        """
        for name, wanted in asdict(key).items():
            found = getattr(self.key, name)
            # Without a guide it does not matter what the cache has of one.
            if found != wanted and not (name in ("guide", "unit") and key.guide is None):
                raise UserError(
                    f"{self.directory}: made for another {name} ({_short(found)}) than this run's ({_short(wanted)}): "
                    f"{_AGAIN}, or name the cache of this run in guidance.cache"
                )

    def check_content(self, rank: int = 0, ranks: int = 1) -> None:
        """Reads a rank's share of the shards, and compares with what was written.

        Raises:
            UserError: A shard is missing or damaged; the message names it.
        """
        mine = range(rank, self.shards.count, ranks)
        found = whole_shards(self.directory, self.key, self.shards, mine)
        for shard in mine:
            if found.get(shard) != self._checksums[shard]:
                raise UserError(f"{shard_path(self.directory, shard)}: missing or damaged: {_AGAIN}")


def _short(value: str | None) -> str:
    return "none" if value is None else value[:12]


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise UserError(f"{directory}: no complete guidance cache ({MANIFEST_FILE} is missing): {_AGAIN}")
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        version, shards = manifest["format_version"], manifest["shards"]
        sizes = manifest["pairs"], manifest["block_pairs"]
        key = asdict(GuidanceKey(**manifest["key"]))
        named = all(isinstance(value, str) or (name == "guide" and value is None) for name, value in key.items())
        sound = all(isinstance(size, int) and size > 0 for size in sizes) and len(shards) == -(-sizes[0] // sizes[1])
    except OSError as error:
        raise read_error(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error!r}): {_AGAIN}") from error
    if version != FORMAT_VERSION or not (sound and named and isinstance(shards, list)):
        raise UserError(f"{path}: damaged, or of another version than {FORMAT_VERSION}: {_AGAIN}")
    result: dict[str, Any] = manifest
    return result


def open_guidance(guidance: GuidanceConfig, method: Method, name: str, dataset: PreferenceDataset) -> GuidanceCache:
    """The guidance cache of a dataset of the run, by its name in ``Config.datasets``, with what the method uses."""
    directory = Path(str(guidance.cache)) / name
    return GuidanceCache(directory, dataset.trained_lengths, use_guide="guide" in method.frozen)
