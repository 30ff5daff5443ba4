"""What the linears of the Transformer Engine layer spec are told, without Transformer Engine."""

from typing import Any

import pytest
import torch

from megatron_tgdpo.mcore_compat import submodules_of
from megatron_tgdpo.models.config import LanguageModelConfig
from megatron_tgdpo.models.layer_spec_te import TransformerEngineParts, te_block_spec


class Linear(torch.nn.Module):
    def __init__(self, input_size: int, output_size: int, *, config: Any) -> None:
        super().__init__()
        self.adds_to_main_grad = config.gradient_accumulation_fusion


class Norm(torch.nn.Module):
    def __init__(self, *arguments: Any) -> None:
        super().__init__()


PARTS = TransformerEngineParts(
    norm=Norm,
    column_linear=Linear,
    row_linear=Linear,
    plain_column_linear=Linear,
    column_grouped=Linear,
    row_grouped=Linear,
)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("post_norms", [True, False])
def test_only_the_layers_linears_add_to_the_gradient_buffer(fused: bool, post_norms: bool) -> None:
    """The embedding and the output weight are megatron-core's own, which would ask for apex."""
    config = LanguageModelConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, post_norms=post_norms, fused_layer_wgrad=fused,
        gradient_accumulation_fusion=False,
    )  # fmt: skip
    (layer,) = te_block_spec(config, [0], torch.nn.Identity, PARTS).layer_specs
    attention, mlp = submodules_of(layer.submodules.self_attention), submodules_of(layer.submodules.mlp)
    for linear in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2):
        assert linear(32, 32, config=config).adds_to_main_grad is fused
    assert config.gradient_accumulation_fusion is False
