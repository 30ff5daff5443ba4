"""Weights: how often an epoch takes each pair, and that the order is a function of the step alone."""

from collections import Counter

import pytest

from megatron_tgdpo.batching.sampler import DatasetPart, Sampler, make_sampler


def stream(order: Sampler) -> list[int]:
    return [index for step in range(1, order.steps + 1) for index in order.step_indices(step)]


def order_of(*parts: tuple[int, float], epochs: float = 1, pairs: int = 4, shuffle: bool = True) -> Sampler:
    return make_sampler([DatasetPart(*part) for part in parts], pairs, None, epochs, shuffle, 3)


@pytest.mark.parametrize("shuffle", [True, False])
def test_weights_of_one_are_concatenation(shuffle: bool) -> None:
    apart, together = order_of((7, 1), (4, 1), epochs=3, shuffle=shuffle), order_of((11, 1), epochs=3, shuffle=shuffle)
    assert stream(apart) == stream(together)


def test_each_epoch_takes_each_pair_by_its_weight() -> None:
    order = order_of((6, 1), (5, 3), (8, 0.5), epochs=4)
    assert order.epoch_pairs == 6 + 15 + 4
    whole = stream(order)
    assert len(whole) == 4 * 25
    for epoch in range(4):
        taken = Counter(whole[25 * epoch : 25 * epoch + 25])
        assert all(taken[index] == 1 for index in range(6))
        assert all(taken[index] == 3 for index in range(6, 11))
        assert sum(taken[index] for index in range(11, 19)) == 4
    # Half of them a time, and never the same half twice before the other had its turn.
    for half in (0, 50):
        taken = Counter(index for index in whole[half : half + 50] if index >= 11)
        assert taken == dict.fromkeys(range(11, 19), 1)
    assert whole[:25] != whole[25:50]
    first, third = ({index for index in whole[start : start + 25] if index >= 11} for start in (0, 50))
    assert first != third


def test_parts_of_a_pass_even_out_over_epochs() -> None:
    """A weight that does not divide: seven pairs, five an epoch."""
    taken = Counter(stream(order_of((7, 0.7), epochs=7)))
    assert taken == dict.fromkeys(range(7), 5)
    taken = Counter(stream(order_of((7, 1.7), epochs=7)))
    assert taken == dict.fromkeys(range(7), 12)


def test_file_order_goes_on_where_the_last_epoch_ended() -> None:
    order = order_of((2, 1), (4, 0.5), (2, 2), epochs=2, shuffle=False)
    assert stream(order) == [0, 1, 2, 3, 6, 7, 6, 7, 0, 1, 4, 5, 6, 7, 6, 7]


def test_a_continued_run_takes_what_the_whole_one_would() -> None:
    parts = [DatasetPart(9, 2), DatasetPart(10, 0.3)]
    whole = make_sampler(parts, 4, 12, None, True, 5)
    for done in (1, 5, 6, 11):
        rest = make_sampler(parts, 4, 12, None, True, 5, done, whole.consumed_pairs(done))
        for step in range(done + 1, 13):
            assert rest.step_indices(step) == whole.step_indices(step)
    smaller = make_sampler(parts, 2, 12, None, True, 5, 6, whole.consumed_pairs(6))
    assert smaller.step_indices(7) + smaller.step_indices(8) == whole.step_indices(7)


def test_datasets_of_one_size_are_not_drawn_alike() -> None:
    taken = stream(order_of((40, 0.5), (40, 0.5)))
    assert {index for index in taken if index < 40} != {index - 40 for index in taken if index >= 40}
