"""Guidance by sentence: which tokens share a reward, and what it is."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from megatron_tgdpo.data.dataset import PreferencePair
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.guidance.cache import GuidanceCache, Shards, write_manifest, write_shard
from megatron_tgdpo.guidance.sentences import SentenceMeans, means_within
from tests.unit.guidance.test_cache import KEY

WORDS = ["Why?", "It", " rains", ".", " He", " left", "!", "</s>", " No", "\n"]


class Words:
    """A tokenizer whose ids are places in WORDS."""

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return "".join(WORDS[i] for i in ids if special or WORDS[i] != "</s>")


def pair(chosen: list[int], rejected: list[int], trained: list[bool] | None = None) -> PreferencePair:
    prompt, *responses = (np.array(ids) for ids in ([0], chosen, rejected))
    return PreferencePair(prompt, *responses, index=0, chosen_trained=None if trained is None else np.array(trained))


def averaged(of: PreferencePair, logratios: list[float]) -> list[float]:
    reference = np.linspace(-3, -1, len(logratios), dtype=np.float32)
    means = SentenceMeans([of], Words())  # type: ignore[arg-type]
    kept, guide = means(0, np.stack([reference, reference + np.array(logratios, np.float32)]))
    assert np.array_equal(kept, reference)
    assert guide.dtype == np.float32
    found: list[float] = (guide - kept).tolist()
    return found


def test_tokens_of_a_sentence_share_its_mean() -> None:
    """ "It rains. He left!</s>" against "No</s>": sentences of three, four and two tokens."""
    found = averaged(pair([1, 2, 3, 4, 5, 6, 7], [8, 7]), [3.0, 0.0, 0.0, 1.0, 2.0, 3.0, -2.0, 1.0, 0.0])
    assert found == pytest.approx([1.0] * 3 + [1.0] * 4 + [0.5] * 2, abs=1e-6)
    assert sum(found) == pytest.approx(8.0, abs=1e-5)


def test_lines_end_sentences_and_only_trained_tokens_count() -> None:
    """ "No\\n" and "He left!", of which the line end and "He" are not trained on."""
    found = averaged(pair([8, 9, 4, 5, 6], [8], [True, False, False, True, True]), [4.0, 1.0, 2.0, 9.0])
    assert found == pytest.approx([4.0, 1.5, 1.5, 9.0], abs=1e-6)


def test_means_within_groups() -> None:
    assert means_within(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 4])).tolist() == [2.0, 2.0, 5.0]
    assert means_within(np.zeros(0), np.zeros(0, dtype=np.int64)).tolist() == []


def test_a_cache_serves_the_unit_that_it_has(tmp_path) -> None:  # type: ignore[no-untyped-def]
    lengths = np.array([[3, 1, 1]])
    key = replace(KEY, unit="sentence")
    values = {name: np.zeros(2, dtype=np.float32) for name in ("reference", "guide")}
    write_shard(tmp_path, 0, key, values)
    write_manifest(tmp_path, key, Shards(lengths, 1))
    cache = GuidanceCache(tmp_path, lengths, use_guide=True)
    cache.check_key(key)
    with pytest.raises(UserError, match=r"made for another unit \(sentence\) than this run's \(token\)"):
        cache.check_key(KEY)
    # DPO takes the reference's values of either.
    cache.check_key(replace(KEY, guide=None))
    assert key.digest != KEY.digest
