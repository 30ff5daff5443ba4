"""How far log-probs are apart, and what of it is allowed."""

import math

import pytest
import torch
import torch.distributed as dist

from megatron_tgdpo.models.logp_tolerance import NEGLIGIBLE, LogpDifference, logp_difference


def test_difference_of_some_packs(single_rank_group: dist.ProcessGroup) -> None:
    del single_rank_group
    packs = [([0.3, -0.1, 0.2], [2, 1]), ([], []), ([-0.5], [0, 1])]
    parts = [(torch.tensor(values), torch.tensor(lengths, dtype=torch.int64)) for values, lengths in packs]
    found = logp_difference(parts, torch.device("cpu"))
    assert found.token == pytest.approx(math.sqrt((0.09 + 0.01 + 0.04 + 0.25) / 4))
    assert found.largest == pytest.approx(0.5)
    assert found.response == pytest.approx(math.sqrt((0.2**2 + 0.2**2 + 0.0 + 0.5**2) / 4))


def test_each_figure_is_compared_with_its_own() -> None:
    unit = LogpDifference(token=0.01, largest=0.05, response=0.06)
    allowed = unit.allowing()
    assert LogpDifference(0.02, 0.1, 0.12).within(allowed)
    # One token, a few tokens everywhere, and a lean to one side.
    assert not LogpDifference(0.02, 0.3, 0.12).within(allowed)
    assert not LogpDifference(0.05, 0.1, 0.12).within(allowed)
    assert not LogpDifference(0.02, 0.1, 0.4).within(allowed)


def test_fp32_has_a_floor_and_nan_is_never_within() -> None:
    exact = LogpDifference(0.0, 0.0, 0.0)
    assert exact.allowing() == NEGLIGIBLE
    broken = LogpDifference(math.nan, 0.0, 0.0)
    assert not broken.within(NEGLIGIBLE)
    assert not exact.within(broken.allowing())
