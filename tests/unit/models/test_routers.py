"""To which experts tokens go by groups and sigmoid scores: as transformers' routers of DeepSeek and GLM choose."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.config import LanguageModelConfig
from megatron_tgdpo.models.experts import choose_experts
from megatron_tgdpo.models.families.experts import deepseek_config_kwargs
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.check import open_hf
from tests.tiny_models import make_model

SIZES = {"hidden_size": 32, "n_routed_experts": 16, "moe_intermediate_size": 8, "routed_scaling_factor": 2.5}


# Groups, how many of them are chosen, and how many experts. All groups have no choice.
CHOSEN, ALL = [(4, 2, 3), (8, 3, 5)], [(1, 1, 4), (4, 4, 6)]


@pytest.mark.skipif(not hasattr(v2, "DeepseekV2TopkRouter"), reason="transformers 5.24 has them")
@pytest.mark.parametrize(
    ("sigmoid", "normalised", "groups", "chosen", "top_k"),
    [(True, normalised, *sizes) for normalised in (True, False) for sizes in CHOSEN + ALL]
    # DeepSeek-V2 normalises nothing, and without groups has megatron-core's own router.
    + [(False, False, *sizes) for sizes in CHOSEN],
)
def test_choices_and_weights(sigmoid: bool, normalised: bool, groups: int, chosen: int, top_k: int) -> None:
    torch.manual_seed(groups)
    options = {**SIZES, "n_group": groups, "topk_group": chosen, "num_experts_per_tok": top_k}
    if sigmoid:
        hf_config = DeepseekV3Config(**options, norm_topk_prob=normalised)
        router = v3.DeepseekV3TopkRouter(hf_config)
        router.e_score_correction_bias.normal_(std=0.2)
    else:
        hf_config = DeepseekV2Config(**options, topk_method="group_limited_greedy")
        router = v2.DeepseekV2TopkRouter(hf_config)
    torch.nn.init.normal_(router.weight)
    logits, theirs, experts = router(torch.randn(300, 32) / 5)
    kwargs = deepseek_config_kwargs(hf_config, sigmoid=sigmoid, normalised=normalised)
    settings = {key: value for key, value in kwargs.items() if key.startswith(("router_", "moe_router_"))}
    config = LanguageModelConfig(
        num_layers=1, hidden_size=32, num_attention_heads=1, num_moe_experts=16, moe_ffn_hidden_size=8,
        add_bias_linear=False, **settings,
    )  # fmt: skip
    weights, routed, _ = choose_experts(logits, config, getattr(router, "e_score_correction_bias", None))
    # Theirs are summed in no order.
    torch.testing.assert_close(weights, torch.zeros(300, 16).scatter(1, experts, theirs), rtol=1e-6, atol=0)
    assert torch.equal(routed, torch.zeros(300, 16, dtype=torch.bool).scatter(1, experts, True))
    assert len(set(map(tuple, routed.tolist()))) > 20, "all go the same way"


def test_later_layers_are_left_out_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_model(tmp_path, "glm4_moe", layers=2, hidden_size=32)
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.2.eh_proj.weight": torch.zeros(32, 64)}, file, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        open_hf(path, read_hf_config(path))
    assert "1 tensors of layers after the model's, as model.layers.2.eh_proj.weight, are left out" in caplog.text
    save_file({**tensors, "mtp.fc.weight": torch.zeros(32, 64)}, file, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        open_hf(path, read_hf_config(path))
    assert "as mtp.fc.weight, are left out" in caplog.text
    save_file({**tensors, "model.layers.3.eh_proj.weight": torch.zeros(32, 64)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.layers.3.eh_proj.weight not expected"):
        open_hf(path, read_hf_config(path))
