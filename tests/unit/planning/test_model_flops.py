"""Operations by the real lengths of pairs: what a mask shows, layer by layer, and what passes multiply."""

import math
from pathlib import Path

import numpy as np
import pytest
from transformers import PretrainedConfig

from megatron_tgdpo.models.families import family_of
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.mapping import global_parameters
from megatron_tgdpo.planning.model_flops import linear_flops, score_flops, seen, step_flops, step_models
from megatron_tgdpo.planning.peak import peak_tflops
from megatron_tgdpo.planning.step_time import layer_flops
from tests.published_configs import PUBLISHED, write_config

LENGTHS = np.array([[5, 3, 7], [2, 9, 1], [11, 4, 4]])


def published(directory: Path, name: str, **changes: int) -> PretrainedConfig:
    return read_hf_config(write_config(directory, {**PUBLISHED[name], **changes}))


def shown(lengths: np.ndarray, window: int | None, shared: bool) -> int:
    """Queries and keys that they see, in the masks of all pairs."""
    total = 0
    for prompt, chosen, rejected in lengths.tolist():
        for side, first in ((chosen, 0), (rejected, prompt if shared else 0)):
            query, key = np.mgrid[first : prompt + side, 0 : prompt + side]
            total += int(((key <= query) & (query - key < (window or 10**6))).sum())
    return total


def test_latent_attention_by_hand(tmp_path: Path) -> None:
    """DeepSeek-V3: queries of 1,536, keys and values of 512 and a rotated 64, 128 heads of 128 + 64 and 128."""
    query, key_value = 7168 * 1536 + 1536 * 128 * 192, 7168 * (512 + 64) + 512 * 128 * (128 + 128)
    mlp = 3 * 7168 * 18432  # of the first layer
    assert linear_flops(published(tmp_path, "DeepSeek-V3"), 0) == 2 * (query + key_value + 128 * 128 * 7168 + mlp)


@pytest.mark.parametrize("window", [None, 1, 6, 100])
def test_what_a_mask_shows(window: int | None) -> None:
    whole = LENGTHS[:, :1] + LENGTHS[:, 1:]
    assert int(seen(whole, window).sum()) == shown(LENGTHS, window, shared=False)
    shared = int(seen(whole, window).sum() - seen(LENGTHS[:, :1], window).sum())
    assert shared == shown(LENGTHS, window, shared=True)


@pytest.mark.parametrize("shared", [True, False])
def test_layers_with_and_without_a_window(tmp_path: Path, shared: bool) -> None:
    gemma = published(tmp_path, "gemma-2-2b", sliding_window=6)
    models = step_models(gemma, [gemma], adapter=False)
    found = step_flops(models, LENGTHS, 20, shared_prompts=shared, chosen_only=False)
    tokens = int(LENGTHS.sum() + (0 if shared else LENGTHS[:, 0].sum()))
    scores = 13 * shown(LENGTHS, 6, shared) + 13 * shown(LENGTHS, None, shared)
    layers = 26 * tokens * linear_flops(gemma) + scores * score_flops(gemma)
    assert found == (3 + 1) * (layers + 2 * 20 * 256000 * 2304)
    beside_adapter = step_models(gemma, [gemma], adapter=True)
    assert step_flops(beside_adapter, LENGTHS, 20, shared_prompts=shared, chosen_only=False) == found * 3 // 4


def test_a_step_of_equal_sequences_is_that_of_the_planner(tmp_path: Path) -> None:
    llama = published(tmp_path, "Llama-3-8B")
    lengths = np.array([[0, 2048, 2048]] * 4)
    found = step_flops(step_models(llama, (), adapter=False), lengths, 0, shared_prompts=False, chosen_only=False)
    assert found == pytest.approx(3 * 8 * 2048 * 32 * layer_flops(llama, 2049))
    assert linear_flops(llama) == 2 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)


@pytest.mark.parametrize("name", PUBLISHED)
def test_linears_of_every_family(tmp_path: Path, name: str) -> None:
    """Two for each element of a layer's matrices; of experts, a token goes to some."""
    model = published(tmp_path, name)
    settings = family_of(model.architectures).config_kwargs(model)
    matrices = [one for one in global_parameters(model, every_expert=False) if len(one.shape) >= 2]
    for layer in (0, model.num_hidden_layers - 1):
        total = 0
        for parameter in (one for one in matrices if one.layer == layer):
            met = settings["moe_router_topk"] if ".experts." in parameter.key else 1
            total += met * math.prod(parameter.shape)
        assert linear_flops(model, layer) == 2 * total


def test_peaks_by_device_and_precision() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp8") == 1978.0
    assert peak_tflops("NVIDIA H200") == 989.0
    assert peak_tflops("NVIDIA H200 NVL") is None
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp8") is None
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_tflops("", "bf16") is None
