"""Frozen models of one base share its weights, and whoever read them last gives their pages back."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.setup import models
from megatron_tgdpo.setup.model_sources import ModelSource
from tests.unit.config.test_loading import VALID


@pytest.mark.parametrize("directory", [None, Path("cache")])
def test_the_guide_releases_the_references_weights(directory: Path | None) -> None:
    """A whole model that is reference and guide is loaded once, and moved once to where it waits."""
    values = {**VALID, "offload": {"frozen": True, "frozen_from": "disk"}}
    config = config_from_dict(values)
    sources = {
        role: ModelSource(Path(base), None) for role, base in (("policy", "a"), ("reference", "b"), ("guide", "b"))
    }
    release = mock.Mock()
    with (
        mock.patch.object(models, "model_sources", return_value=sources),
        mock.patch.object(models, "load_model", return_value=["chunk"]) as load,
        mock.patch.object(models, "offload", return_value=release) as offload,
    ):
        device = torch.device("cpu")
        ((reference, guide),) = models.load_frozen_models(
            config, dict.fromkeys(sources), mock.Mock(), mock.Mock(), device, directory=directory
        )
    load.assert_called_once()
    offload.assert_called_once_with("chunk", config, device, directory or Path(config.output_dir))
    assert reference.release is guide.release is release
    assert (reference.shared, guide.shared) == (False, True)
