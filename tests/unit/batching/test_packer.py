"""Packs: what they must hold, by the config and by the data, and which pairs go into which."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tgdpo.batching.packer import first_fit_decreasing
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.setup.datasets import prepare_data
from tests.tiny_models import make_tokenizer
from tests.unit.config.test_loading import VALID

VOCABULARY = 64


def config_of(directory: Path, **sections: Any) -> Config:
    make_tokenizer(VOCABULARY).save_pretrained(directory / "tokenizer")
    path = directory / "pairs.jsonl"
    words = " ".join(f"w{number}" for number in range(10))
    records = [{"prompt": words, "chosen": f"w1 w2 w{number}", "rejected": "w3 " * 20 + "w4"} for number in (5, 6)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    data = {"train": str(path), "tokenizer": str(directory / "tokenizer"), "workers": 1, "max_length": 2048}
    return config_from_dict({**VALID, "data": data, **sections})


UNSHARED = {"batch": {"global_pairs": 2, "shared_prompts": False}}
SFT = {"model": {"policy": "policy"}, "loss": {"method": "sft"}}
CONTEXT = {"parallel": {"context": 2, "tensor": 4, "sequence_parallel": True}}


@pytest.mark.parametrize(
    ("sections", "columns", "multiple"),
    [
        ({}, "pc r", 1),
        (UNSHARED, "pc pr", 1),
        (SFT, "pc", 1),
        (CONTEXT, "pc r", 8),
        ({**CONTEXT, **UNSHARED}, "pc pr", 8),
    ],
    ids=["shared", "unshared", "sft", "context", "context-unshared"],
)
def test_a_row_holds_the_longest_pair_and_no_more(
    tmp_path: Path, sections: dict[str, Any], columns: str, multiple: int
) -> None:
    (prepared,) = prepare_data(config_of(tmp_path, **sections), tmp_path / "cache", []).values()
    tokens = dict(zip("pcr", prepared.open().lengths[0].tolist(), strict=True))
    segments = [sum(tokens[column] for column in segment) for segment in columns.split()]
    # Under context parallelism each segment is padded to a multiple of four.
    parts = [-(-segment // 4) * 4 if multiple > 1 else segment for segment in segments]
    least = -(-sum(parts) // multiple) * multiple
    batch = {"global_pairs": 2, **sections.get("batch", {})}
    fitting = {**sections, "batch": {**batch, "tokens_per_micro_batch": least}}
    assert prepare_data(config_of(tmp_path, **fitting), tmp_path / "cache", []) == {"train": prepared}
    short = {**sections, "batch": {**batch, "tokens_per_micro_batch": least - multiple}}
    with pytest.raises(UserError, match=rf"pairs\.jsonl:1: the pair takes .* at least {least} "):
        prepare_data(config_of(tmp_path, **short), tmp_path / "cache", [])


@pytest.mark.parametrize(
    ("max_length", "parallel", "expected"),
    [
        (2048, {}, 4096),
        (2049, {}, 4098),
        (2049, {"context": 2}, 2 * 2052),
        (2049, {"tensor": 4, "sequence_parallel": True}, 4100),
        (2048, {"context": 3, "tensor": 4, "sequence_parallel": True}, 4104),
    ],
)
def test_rows_hold_any_pair_where_nothing_is_said(max_length: int, parallel: dict[str, Any], expected: int) -> None:
    data = {"train": "pairs.jsonl", "max_length": max_length}
    assert config_from_dict({**VALID, "data": data, "parallel": parallel}).seq_length == expected


def test_sft_has_no_prompts_to_share() -> None:
    assert not config_from_dict({**VALID, **SFT}).shared_prompts
    batch = {"global_pairs": 1, "shared_prompts": True}
    assert not config_from_dict({**VALID, **SFT, "batch": batch, "parallel": {"context": 2}}).shared_prompts


def first_fit(tokens: list[int], capacity: int) -> list[list[int]]:
    """Each, the longest first, into the first pack with room, looked for one by one."""
    packs: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(tokens)), key=lambda place: (-tokens[place], place)):
        slot = next((slot for slot, free in enumerate(room) if free >= tokens[place]), len(packs))
        if slot == len(packs):
            packs.append([])
            room.append(capacity)
        packs[slot].append(place)
        room[slot] -= tokens[place]
    return packs


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 100, 700])
@pytest.mark.parametrize("longest", [1, 7, 40, 64])
def test_packs_are_those_of_first_fit(count: int, longest: int) -> None:
    """The order of pairs in packs is the same whatever finds the pack, so that losses are, too."""
    tokens = np.random.default_rng(count).integers(1, longest, count, endpoint=True).tolist()
    packs, room = first_fit_decreasing(range(count), tokens, 64)
    assert packs == first_fit(tokens, 64)
    assert room == [64 - sum(tokens[place] for place in pack) for pack in packs]


def test_many_pairs_fill_their_packs() -> None:
    """A pair takes a seventh of a pack on average, and at most half, as with the default size of packs."""
    lengths = np.clip(np.random.default_rng(3).lognormal(6.3, 0.6, 20_000), 16, 2048).astype(int)
    packs, _ = first_fit_decreasing(range(len(lengths)), lengths.tolist(), 4096)
    assert len(packs) <= 1.02 * lengths.sum() / 4096


def test_a_pair_that_fits_no_pack_is_an_error() -> None:
    with pytest.raises(ValueError, match="65 tokens in packs of 64"):
        first_fit_decreasing([0, 1], [3, 65], 64)
