"""How long the sequences are that a conversion is verified with."""

from pathlib import Path

import pytest

from checkpoints_convert.probes import long_length, make_probes, spans
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from tests.published_configs import PUBLISHED, write_config
from tests.tiny_models import make_model


def test_windows_and_original_lengths_are_passed_where_they_can_be(tmp_path: Path) -> None:
    gemma3 = read_hf_config(write_config(tmp_path, PUBLISHED["gemma-3-1b"]))
    assert (spans(gemma3), long_length(gemma3)) == ({"sliding window": 512}, 576)
    olmo3 = read_hf_config(write_config(tmp_path, PUBLISHED["Olmo-3-7B"]))
    assert spans(olmo3) == {"sliding window": 4096, "original rope length": 8192}


def test_no_probe_is_longer_than_the_model_is_exact(tmp_path: Path) -> None:
    ministral3 = make_model(tmp_path, "ministral3", layers=2)
    hf_config = read_hf_config(ministral3)
    assert (spans(hf_config), long_length(hf_config)) == ({}, 128)
    assert max(len(probe.tokens) for probe in make_probes(ministral3, hf_config, 128)) == 128
    with pytest.raises(UserError, match=r"--long-tokens 129: .* only up to 128"):
        make_probes(ministral3, hf_config, 129)
