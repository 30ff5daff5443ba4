"""Data order, packing plan and collation."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron_tgdpo.batching.collate import PreferenceBatch, collate
from megatron_tgdpo.batching.packed_sequence import PackFormat
from megatron_tgdpo.batching.packer import plan_packs
from megatron_tgdpo.batching.sampler import DatasetPart, make_sampler
from megatron_tgdpo.data.dataset import PreferencePair


def pair(index: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> PreferencePair:
    return PreferencePair(np.array(prompt), np.array(chosen), np.array(rejected), index)


def test_every_pair_is_seen_once_per_epoch_in_a_new_order() -> None:
    order = make_sampler([DatasetPart(10)], 4, steps=5, epochs=None, shuffle=True, seed=1)
    stream = [i for step in range(1, 6) for i in order.step_indices(step)]
    assert len(stream) == 20
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    assert stream[:10] != list(range(10))
    again = make_sampler([DatasetPart(10)], 4, steps=5, epochs=None, shuffle=True, seed=1)
    assert [again.step_indices(step) for step in (3, 1)] == [stream[8:12], stream[:4]]
    other = make_sampler([DatasetPart(10)], 4, steps=5, epochs=None, shuffle=True, seed=2)
    assert other.step_indices(1) != stream[:4]


def test_epochs_end_with_a_smaller_step_and_file_order_is_kept() -> None:
    order = make_sampler([DatasetPart(10)], 4, steps=None, epochs=1, shuffle=False, seed=1)
    assert order.steps == 3
    assert [order.step_indices(step) for step in (1, 2, 3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [order.consumed_pairs(step) for step in (0, 1, 3)] == [0, 4, 10]


def test_a_changed_batch_goes_on_with_the_pairs_that_follow() -> None:
    before = make_sampler([DatasetPart(10)], 4, steps=5, epochs=None, shuffle=True, seed=1)
    seen = [index for step in (1, 2) for index in before.step_indices(step)]
    after = make_sampler([DatasetPart(10)], 2, 6, None, True, 1, done_steps=2, done_pairs=before.consumed_pairs(2))
    assert after.steps == 6
    later = [index for step in range(3, 7) for index in after.step_indices(step)]
    assert len(later) == 8
    stream = [index for step in range(1, 5) for index in before.step_indices(step)]
    assert seen + later == stream
    # As it was, it is the same order.
    same = make_sampler([DatasetPart(10)], 4, 5, None, True, 1, done_steps=2, done_pairs=8)
    assert [same.step_indices(step) for step in (3, 4, 5)] == [before.step_indices(step) for step in (3, 4, 5)]


def test_more_epochs_after_a_smaller_last_step_skip_nothing() -> None:
    before = make_sampler([DatasetPart(10)], 4, None, 1, False, 1)
    assert (before.steps, before.consumed_pairs(3)) == (3, 10)
    after = make_sampler([DatasetPart(10)], 4, None, 2, False, 1, done_steps=3, done_pairs=10)
    assert after.steps == 6
    assert [index for step in (4, 5, 6) for index in after.step_indices(step)] == list(range(10))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_plan_holds_every_pair_once_within_the_rows_and_evenly_deep(ranks: int) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 60, size=23).tolist()
    indices = list(range(100, 123))
    plan = plan_packs(indices, tokens, 64, ranks)
    assert len(plan) == ranks
    assert len({len(packs) for packs in plan}) == 1
    packed = [i for packs in plan for pack in packs for i in pack]
    assert sorted(packed) == indices
    cost = dict(zip(indices, tokens, strict=True))
    assert max(sum(cost[i] for i in pack) for packs in plan for pack in packs) <= 64
    loads = [sum(cost[i] for pack in packs for i in pack) for packs in plan]
    assert max(loads) - min(loads) <= 64
    assert plan == plan_packs(indices, tokens, 64, ranks)


def test_a_plan_of_fewer_packs_than_ranks_gives_empty_packs() -> None:
    assert plan_packs([7], [10], 64, 3) == [[[7]], [[]], [[]]]


def test_collate() -> None:
    batch = collate([pair(4, [10, 11], [12, 13, 2], [14]), pair(9, [20], [21], [22, 23])], PackFormat(16))
    assert batch.tokens.tolist() == [[10, 11, 12, 13, 2, 10, 11, 14, 20, 21, 20, 22, 23, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 0, 1, 2, 0, 0, 0]]
    assert batch.packing.cu_seqlens_q.tolist() == [0, 5, 8, 10, 13]
    assert batch.packing.max_seqlen_q == 5
    assert batch.response_lengths.tolist() == [3, 1, 1, 2]
    assert batch.targets.tolist() == [12, 13, 2, 14, 21, 22, 23]
    # Each target is the token right after its logit position.
    assert torch.equal(batch.tokens[0, batch.logit_positions + 1], batch.targets)
    assert batch.pair_indices.tolist() == [4, 9]
    assert PackFormat(16).pair_tokens(np.array([[2, 3, 1], [1, 1, 2]])).tolist() == [8, 5]
    assert PackFormat(16).real_tokens(np.array([[2, 3, 1], [1, 1, 2]])) == 13


def test_collate_without_pairs() -> None:
    batch = collate([], PackFormat(8))
    assert batch.tokens.shape == (1, 8)
    assert batch.packing.cu_seqlens_q.tolist() == [0]
    assert batch.targets.numel() == batch.logit_positions.numel() == batch.response_lengths.numel() == 0


PAIRS = [pair(4, [10, 11], [12, 13, 2], [14]), pair(9, [20], [21], [22, 23])]


def test_a_shared_prompt_is_there_once() -> None:
    pack = PackFormat(12, shared_prompts=True)
    batch = collate(PAIRS, pack)
    assert batch.tokens.tolist() == [[10, 11, 12, 13, 2, 14, 20, 21, 22, 23, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 1, 2, 0, 0]]
    assert batch.packing.cu_seqlens_q.tolist() == [0, 5, 6, 8, 10]
    assert batch.packing.cu_seqlens_kv.tolist() == [0, 5, 8, 10, 13]
    assert batch.packing.kv_index is not None
    assert batch.packing.kv_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 6, 8, 9]
    # The prompt's last position predicts the first token of both responses.
    assert batch.logit_positions.tolist() == [1, 2, 3, 1, 6, 6, 8]
    assert batch.targets.tolist() == [12, 13, 2, 14, 21, 22, 23]
    # And belongs to both.
    of_token = [[0, 1], [0, 1], [0, -1], [0, -1], [0, -1], [1, -1], [2, 3], [2, -1], [3, -1], [3, -1]]
    assert batch.packing.sequences.of_token.tolist() == [*of_token, [-1, -1], [-1, -1]]
    assert batch.packing.sequences.weights.tolist() == [0.5] * 4
    assert pack.pair_tokens(np.array([[2, 3, 1], [1, 1, 2]])).tolist() == [6, 4]
    assert pack.real_tokens(np.array([[2, 3, 1], [1, 1, 2]])) == 10


def test_context_ranks_hold_every_response_token_once() -> None:
    formats = [PackFormat(32, context=2, context_rank=rank) for rank in range(2)]
    assert formats[0].pair_tokens(np.array([[2, 3, 1], [1, 1, 2]])).tolist() == [8 + 4, 4 + 4]
    parts = [collate(PAIRS, pack) for pack in formats]
    whole = collate(PAIRS, PackFormat(32))
    assert sorted(np.concatenate([part.response_order for part in parts]).tolist()) == list(range(7))
    for part in parts:
        assert part.tokens.shape == (1, 16)
        assert torch.equal(part.targets, whole.targets[part.response_order])
        assert int(part.response_lengths.sum()) == len(part.targets)
    assert torch.equal(parts[0].response_lengths + parts[1].response_lengths, whole.response_lengths)
    # Sequence 1 has 5 tokens, padded to 8 in chunks of 2: rank 0 holds the first and the last chunk.
    assert parts[0].tokens[0, :4].tolist() == [10, 11, 0, 0]
    assert parts[1].tokens[0, :4].tolist() == [12, 13, 2, 0]
    assert parts[0].position_ids[0, :4].tolist() == [0, 1, 0, 0]
    assert [part.packing.sequences.of_token[:4, 0].tolist() for part in parts] == [[0, 0, -1, -1], [0, 0, 0, -1]]


def test_where_only_chosen_responses_train_a_sequence_weighs_as_its_tokens() -> None:
    sequences = collate(PAIRS, PackFormat(8, chosen_only=True)).packing.sequences
    assert sequences is not None
    assert sequences.of_token[:, 0].tolist() == [0, 0, 0, 0, 0, 2, 2, -1]
    assert sequences.weights.tolist() == [3, 0, 1, 0]


def attended(batches: list[PreferenceBatch]) -> list[list[tuple[int, int]]]:
    """What each logit position of a pack sees, from all context ranks: (token, position) of its keys, in order."""
    tokens = torch.cat([batch.tokens[0] for batch in batches]).tolist()
    places = torch.cat([batch.position_ids[0] for batch in batches]).tolist()
    found: dict[int, list[tuple[int, int]]] = {}
    for batch in batches:
        packing = batch.packing
        assert packing.kv_index is not None
        assert packing.cu_seqlens_q is not None
        assert packing.cu_seqlens_kv is not None
        seen: dict[int, list[int]] = {}
        bounds = zip(pairwise(packing.cu_seqlens_q.tolist()), pairwise(packing.cu_seqlens_kv.tolist()), strict=True)
        for (start, end), (first, last) in bounds:
            keys = packing.kv_index[first:last].tolist()
            for query in range(start, end):
                seen[query] = keys[: len(keys) - (end - 1 - query)]
        for order, position in zip(batch.response_order.tolist(), batch.logit_positions.tolist(), strict=True):
            found[order] = [(tokens[key], places[key]) for key in seen[position]]
    return [found[order] for order in range(len(found))]


@pytest.mark.parametrize("context", [2, 4])
def test_a_shared_prompt_is_split_as_all_else_and_seen_whole(context: int) -> None:
    lengths = np.array([[9, 6, 11], [1, 1, 2], [3, 20, 1]])
    words = iter(range(10, 200))
    pairs = [pair(i, *([next(words) for _ in range(n)] for n in row)) for i, row in enumerate(lengths.tolist())]
    formats = [PackFormat(128, True, context, rank) for rank in range(context)]
    multiple = 2 * context
    padded = [sum(-(-n // multiple) * multiple for n in (row[0] + row[1], row[2])) for row in lengths.tolist()]
    assert formats[0].pair_tokens(lengths).tolist() == padded
    assert PackFormat(128, True).real_tokens(lengths) == formats[0].real_tokens(lengths) == lengths.sum()
    parts, whole = [collate(pairs, pack) for pack in formats], collate(pairs, PackFormat(128, True))
    for part in parts:
        assert part.tokens.shape == (1, 128 // context)
        assert torch.equal(part.targets, whole.targets[part.response_order])
    assert torch.equal(torch.stack([part.response_lengths for part in parts]).sum(dim=0), whole.response_lengths)
    assert attended(parts) == attended([whole])
    # Work is as even as tokens are: all ranks have as many query-key pairs.
    queries, keys = (
        [getattr(part.packing, name).diff() for part in parts] for name in ("cu_seqlens_q", "cu_seqlens_kv")
    )
    assert len({int((q * k - q * (q - 1) // 2).sum()) for q, k in zip(queries, keys, strict=True)}) == 1


def test_a_row_is_cut_where_it_ends() -> None:
    pack = PackFormat(64, multiple=4)
    batch, whole = collate(PAIRS, pack), collate(PAIRS, PackFormat(64))
    assert batch.tokens.shape == (1, 16)
    assert torch.equal(batch.tokens, whole.tokens[:, :16])
    assert torch.equal(batch.logit_positions, whole.logit_positions)
    assert collate([], pack).tokens.shape == (1, 4)
    assert [pack.cut(used) for used in (0, 4, 5, 64)] == [4, 4, 8, 64]
    part = collate(PAIRS, PackFormat(64, context=2, context_rank=1, multiple=8))
    assert part.tokens.shape == (1, 12)
    assert torch.equal(part.targets, collate(PAIRS, PackFormat(64, context=2, context_rank=1)).targets)


class Cache:
    """Reference -1, -2, ... and guide -11, -12, ... for the tokens of every pair."""

    guided = True

    def logps(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        count = {4: 4, 9: 3}[index]
        return -np.arange(1.0, count + 1, dtype=np.float32), -np.arange(11.0, count + 11, dtype=np.float32)


def test_cached_logps_follow_their_tokens() -> None:
    reference = [-1, -2, -3, -4, -1, -2, -3]
    for pack in (PackFormat(32), PackFormat(32, shared_prompts=True)):
        batch = collate(PAIRS, pack, Cache())
        assert batch.reference_logps is not None
        assert batch.guide_logps is not None
        assert batch.reference_logps.tolist() == reference
        assert batch.guide_logps.tolist() == [value - 10 for value in reference]
        assert batch.reference_logps.dtype == torch.float32
    for rank in range(2):
        part = collate(PAIRS, PackFormat(32, context=2, context_rank=rank), Cache())
        assert part.reference_logps is not None
        assert part.reference_logps.tolist() == [reference[i] for i in part.response_order]
    empty = collate([], PackFormat(8), Cache())
    assert empty.reference_logps is not None
    assert empty.guide_logps is not None
    assert empty.reference_logps.numel() == empty.guide_logps.numel() == 0


def test_all_that_goes_to_a_gpu_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out would make its copy wait; where there is no CUDA, pinning is counted."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.data_ptr()) or tensor.clone())
    pack = collate([pair(0, [1, 2], [3, 4], [5])], PackFormat(8, shared_prompts=True))
    other = pack.pinned()
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: moved.append(tensor.data_ptr()) or tensor)
    pack.to(torch.device("cpu"))
    assert pinned == moved
    assert len(pinned) == 9
    assert torch.equal(other.tokens, pack.tokens)
    assert torch.equal(other.packing.kv_index, pack.packing.kv_index)
