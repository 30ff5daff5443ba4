import pytest

from megatron_tgdpo.data.truncation import shared_cutoff

# Worked out by hand from the rule: a response below half the limit is kept whole; else a prompt below half is kept
# whole; else the response gets floor(cutoff * target / (source + target)); the prompt gets what is left.
TABLE = [
    # source, target, cutoff -> source, target
    (10, 10, 100, 10, 10),
    (200, 40, 100, 60, 40),  # short response whole, prompt cut
    (200, 49, 100, 51, 49),
    (200, 50, 100, 80, 20),  # 50 is not below half: in proportion, 100 * 50/250
    (30, 200, 100, 30, 70),  # short prompt whole, response cut
    (49, 51, 100, 49, 51),
    (50, 50, 100, 50, 50),  # both at half: in proportion, nothing cut
    (300, 100, 100, 75, 25),
    (100, 300, 100, 25, 75),
    (70, 60, 100, 54, 46),  # 100 * 60/130 = 46.15
    (1000, 5, 10, 10, 0),  # 10 * 5/1005 rounds to no response: the caller drops the pair
    (0, 5, 4, 0, 4),
]


@pytest.mark.parametrize(("source", "target", "cutoff", "new_source", "new_target"), TABLE)
def test_shared_cutoff_table(source, target, cutoff, new_source, new_target):
    assert shared_cutoff(source, target, cutoff) == (new_source, new_target)


def test_never_above_the_cutoff_nor_above_what_there_is():
    for cutoff in (2, 3, 10, 17):
        for source in range(40):
            for target in range(40):
                new_source, new_target = shared_cutoff(source, target, cutoff)
                assert new_source + new_target <= cutoff
                assert 0 <= new_source <= source
                assert 0 <= new_target <= target
                if source + target <= cutoff:
                    assert (new_source, new_target) == (source, target)


def test_prompt_below_half_the_cutoff_is_never_cut():
    for cutoff in (2, 3, 10, 17):
        for source in range((cutoff + 1) // 2):
            assert all(shared_cutoff(source, target, cutoff)[0] == source for target in range(100))
