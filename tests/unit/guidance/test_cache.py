"""The cache's files: whole or refused, whatever byte is wrong, and only for what they were made for."""

import json
import os
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_tgdpo.errors import StorageError, UserError
from megatron_tgdpo.guidance.cache import (
    GuidanceCache,
    GuidanceKey,
    Shards,
    shard_path,
    whole_shards,
    write_manifest,
    write_shard,
)

LENGTHS = np.array([[3, 2, 1], [1, 4, 4], [9, 1, 2], [2, 3, 3], [5, 1, 1]])
KEY = GuidanceKey("data", "tokenizer", "template", "reference", "guide", "fp32")
SHARDS = Shards(LENGTHS, 2)


def values_of(pair: int) -> np.ndarray:
    """[2, tokens] reference and guide, all different."""
    tokens = int(LENGTHS[pair, 1:].sum())
    return -(np.arange(2 * tokens, dtype=np.float32).reshape(2, -1) + 100 * pair)


def fill(directory: Path, key: GuidanceKey = KEY, shards: range = range(3)) -> Path:
    for shard in shards:
        values = np.concatenate([values_of(pair) for pair in SHARDS.pairs(shard)], axis=1)
        roles = ("reference", "guide") if key.guide else ("reference",)
        write_shard(directory, shard, key, dict(zip(roles, values, strict=False)))
    return directory


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_manifest(fill(tmp_path), KEY, SHARDS)
    return tmp_path


def test_every_pair_gets_its_values(cache: Path) -> None:
    opened = GuidanceCache(cache, LENGTHS, use_guide=True)
    opened.check_key(KEY)
    opened.check_content()
    for pair in (4, 0, 3, 1, 2):
        reference, guide = opened.logps(pair)
        assert guide is not None
        assert np.array_equal(np.stack([reference, guide]), values_of(pair))
        assert reference.dtype == guide.dtype == np.float32


def test_a_cache_with_a_guide_serves_dpo(cache: Path) -> None:
    opened = GuidanceCache(cache, LENGTHS, use_guide=False)
    opened.check_key(replace(KEY, guide=None))
    assert opened.logps(2)[1] is None


def test_a_cache_without_a_guide_does_not_serve_tgdpo(tmp_path: Path) -> None:
    key = replace(KEY, guide=None)
    write_manifest(fill(tmp_path, key), key, SHARDS)
    GuidanceCache(tmp_path, LENGTHS, use_guide=False).check_content()
    with pytest.raises(UserError, match="made without a guide"):
        GuidanceCache(tmp_path, LENGTHS, use_guide=True)


@pytest.mark.parametrize("what", ["data", "tokenizer", "template", "reference", "guide", "dtype"])
def test_a_stale_cache_is_refused_by_what_differs(cache: Path, what: str) -> None:
    with pytest.raises(UserError, match=f"made for another {what} "):
        GuidanceCache(cache, LENGTHS, use_guide=True).check_key(replace(KEY, **{what: "other"}))


def test_every_flipped_byte_is_found(cache: Path) -> None:
    path = shard_path(cache, 1)
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        assert 1 not in whole_shards(cache, KEY, SHARDS), f"byte {position}"
    path.write_bytes(content)
    assert whole_shards(cache, KEY, SHARDS).keys() == {0, 1, 2}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap"])
def test_damage_is_named(cache: Path, damage: str) -> None:
    path = shard_path(cache, 1)
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "swap":
        # Whole in itself, of another place.
        path.write_bytes(shard_path(cache, 0).read_bytes())
    else:
        path.write_bytes(content[:-1] if damage == "truncate" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: missing or damaged: run tgdpo guidance"):
        GuidanceCache(cache, LENGTHS, use_guide=True).check_content()


def test_a_shard_that_cannot_be_read_is_not_computed_again(cache: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(cache, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limit[1]))
    try:
        with pytest.raises(StorageError) as error:
            whole_shards(cache, KEY, SHARDS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert "shard-00000.safetensors: cannot be read" in str(error.value)


def test_an_incomplete_cache_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, shards=range(2))
    with pytest.raises(UserError, match="no complete guidance cache"):
        GuidanceCache(tmp_path, LENGTHS, use_guide=True)
    with pytest.raises(UserError, match=r"shard-00002\.safetensors: missing"):
        write_manifest(tmp_path, KEY, SHARDS)
    assert not (tmp_path / "manifest.json").exists()


def test_shards_of_another_key_or_another_division_are_computed_again(tmp_path: Path) -> None:
    fill(tmp_path)
    assert whole_shards(tmp_path, KEY, SHARDS).keys() == {0, 1, 2}
    assert not whole_shards(tmp_path, replace(KEY, guide="other"), SHARDS)
    assert not whole_shards(tmp_path, KEY, Shards(LENGTHS, 3))


@pytest.mark.parametrize("change", ["text", "version", "pairs", "shards", "key"])
def test_a_damaged_manifest_is_refused(cache: Path, change: str) -> None:
    path = cache / "manifest.json"
    manifest = json.loads(path.read_text())
    if change == "text":
        path.write_text("{")
    else:
        wrong = {"version": ("format_version", 2), "pairs": ("pairs", 6), "shards": ("shards", []), "key": ("key", {})}
        name, value = wrong[change]
        path.write_text(json.dumps({**manifest, name: value}))
    with pytest.raises(UserError):
        GuidanceCache(cache, LENGTHS, use_guide=True)
