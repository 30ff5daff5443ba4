"""RMSNorm and rotary angles against transformers' own modules."""

from pathlib import Path

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoConfig, LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.config import transformer_config_kwargs
from megatron_tgdpo.models.norm import RMSNorm
from megatron_tgdpo.models.rotary import RotaryFrequencies, head_dim
from tests.tiny_models import make_llama

CPU = torch.device("cpu")


def config(**overrides) -> TransformerConfig:
    arguments = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "use_cpu_initialization": True}
    return TransformerConfig(**{**arguments, **overrides})


def test_norm_equals_hf() -> None:
    ours, theirs = RMSNorm(config(), hidden_size=32, eps=1e-3), LlamaRMSNorm(32, eps=1e-3)
    weight = torch.randn(32)
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
    hidden = torch.randn(5, 1, 32) * 0.05  # small, so that eps counts
    assert torch.allclose(ours(hidden), theirs(hidden), atol=1e-6)
    assert not torch.allclose(ours(hidden), LlamaRMSNorm(32, eps=1e-6)(hidden) * weight, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_centered_norm_equals_gemmas(dtype: torch.dtype) -> None:
    settings = config(layernorm_zero_centered_gamma=True, params_dtype=dtype, bf16=dtype == torch.bfloat16)
    ours, theirs = RMSNorm(settings, 32, eps=1e-3), Gemma2RMSNorm(32, eps=1e-3).to(dtype)
    weight = torch.randn(32) * 0.01  # in bf16, 1 + weight keeps two digits of it
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
    hidden = (torch.randn(5, 1, 32) * 0.05).to(dtype)
    out = ours(hidden)
    assert out.dtype == dtype
    # Theirs in fp32 with the rounded weights. In bf16 ours is that, rounded once: by at most half a unit, 2 ** -8. The
    # fp32 sums of the two may round a little differently.
    once = 2**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(out.float(), theirs.float()(hidden.float()), rtol=once + 1e-5, atol=1e-6)


def test_norm_has_the_models_dtype() -> None:
    norm = RMSNorm(config(params_dtype=torch.bfloat16, bf16=True), 32)
    assert norm.weight.dtype == torch.bfloat16
    assert norm(torch.randn(2, 1, 32).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_norm_is_marked_for_sequence_parallelism(sequence_parallel: bool) -> None:
    made = RMSNorm(config(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel), 32)
    assert made.weight.sequence_parallel is sequence_parallel


ROPES: dict[str, dict | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn with its own factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 0.7,
        "beta_fast": 20.0, "beta_slow": 2.0,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("rope", [*ROPES, "llama3"])
def test_rotary_equals_hf(tmp_path: Path, rope: str) -> None:
    """To the last position that the config promises; YaRN's factor is in the softmax's scale instead."""
    path = make_llama(tmp_path, llama3_rope=rope == "llama3", rope=ROPES.get(rope), head_dim=32, layers=1)
    hf_config = AutoConfig.from_pretrained(path)
    layout, scale = make_layout(1, 1, 1, False, 1), 32**-0.5
    kwargs = transformer_config_kwargs(hf_config, layout, dtype=torch.float32, device=CPU)
    factor = LlamaRotaryEmbedding(hf_config).attention_scaling
    assert kwargs.get("softmax_scale", scale) == pytest.approx(scale * factor**2)
    assert (factor != 1.0) == rope.startswith("yarn")
    positions = torch.tensor([[0, 1, 2, 0, 1, 63, 64, 65, 500, 2000]])
    angles = RotaryFrequencies(hf_config, CPU)(positions)
    cos, sin = LlamaRotaryEmbedding(hf_config)(torch.zeros(1, dtype=torch.float32), positions)
    assert angles.shape == (10, 1, 1, 32)
    assert angles.dtype == torch.float32
    # As exact as angles in fp32 can be: the two make powers and products in tensors of different shapes.
    limit = 4 * torch.finfo(torch.float32).eps * angles[:, 0, 0].abs().clamp(min=1.0)
    assert ((angles.cos()[:, 0, 0] - cos[0] / factor).abs() <= limit).all()
    assert ((angles.sin()[:, 0, 0] - sin[0] / factor).abs() <= limit).all()


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "proportional"}, "rope type 'proportional' .* linear, yarn, dynamic, longrope"),
        ({"rope_type": "linear", "factor": 0.0}, "gives no finite frequencies"),
        ({"rope_type": "default", "partial_rotary_factor": 0.03}, "partial_rotary_factor 0.03 rotates 3 elements"),
    ],
)
def test_other_rotary_types_are_refused(scaling: dict, message: str) -> None:
    hf_config = LlamaConfig()
    name = "rope_parameters" if hasattr(hf_config, "rope_parameters") else "rope_scaling"
    setattr(hf_config, name, {"rope_theta": 10000.0, **scaling})
    with pytest.raises(UserError, match=message):
        RotaryFrequencies(hf_config, CPU)


def test_head_dim_may_be_missing() -> None:
    hf_config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    hf_config.head_dim = None
    assert head_dim(hf_config) == 16
