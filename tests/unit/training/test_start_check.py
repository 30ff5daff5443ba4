"""What the first step says where policy and reference are the same."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.models.logp_tolerance import LogpDifference
from megatron_tgdpo.training.start_check import check_start
from tests.unit.config.test_loading import VALID


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({}, ", so loss is ln 2 and accuracy 0, as ties are wrong"),
        ({"form": "ipo", "beta": 0.1}, ", so loss is 25 and accuracy 0, as ties are wrong"),
        ({"form": "hinge"}, ", so loss is 1 and accuracy 0, as ties are wrong"),
        # Both differ between pairs.
        ({"sft_weight": 0.5}, ""),
        ({"reference_free": True}, ""),
    ],
)
def test_it_names_the_loss_of_the_form(loss: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture) -> None:
    engine: Any = SimpleNamespace(loss=config_from_dict({**VALID, "loss": loss}).loss)
    metrics: Any = SimpleNamespace(difference=LogpDifference(0.0, 0.0, 0.0))
    with caplog.at_level(logging.INFO, "megatron_tgdpo"):
        check_start(engine, (), metrics)
    assert caplog.messages == [f"step 1: policy and reference are the same{said}"]
