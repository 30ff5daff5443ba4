"""Latent attention alone beside transformers' own, on a pack with a prompt that two responses share."""

from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from transformers import DeepseekV2Config, DeepseekV3Config, PretrainedConfig
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from megatron_tgdpo.batching.packed_sequence import PackedSequence
from megatron_tgdpo.models.attention.latent import LatentAttentionSubmodules, LatentSelfAttention, ReplicatedLinear
from megatron_tgdpo.models.attention.sdpa import PackedCausalAttention
from megatron_tgdpo.models.config import LanguageModelConfig, _rotary_kwargs
from megatron_tgdpo.models.families import dense, latent
from megatron_tgdpo.models.norm import RMSNorm
from megatron_tgdpo.models.rotary import RotaryFrequencies

# A prompt of 90 and two responses of 40 and 60 that both follow it; a sequence of its own; padding.
PROMPT, CHOSEN, REJECTED, OTHER, PADDING = 90, 40, 60, 50, 16
USED = PROMPT + CHOSEN + REJECTED + OTHER
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "max_position_embeddings": 2048,
    "attn_implementation": "eager",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
# As published, with both factors alike; where they are not, what is rotated has a factor of its own.
SCALED, FACTORS = {"mscale": 0.707, "mscale_all_dim": 0.707}, {"mscale": 2.0, "mscale_all_dim": 0.5}
OURS = {
    "q_proj": "linear_q",
    "q_a_proj": "linear_q_down",
    "q_a_layernorm": "q_layernorm",
    "q_b_proj": "linear_q_up",
    "kv_a_proj_with_mqa": "linear_kv_down",
    "kv_a_layernorm": "kv_layernorm",
    "kv_b_proj": "linear_kv_up",
    "o_proj": "linear_proj",
}


def build(hf_config: PretrainedConfig, *, interleaved: bool) -> LatentSelfAttention:
    group = torch.distributed.group.WORLD
    kwargs = {**dense.config_kwargs(hf_config), **latent.attention_kwargs(hf_config, interleaved=interleaved)}
    config = LanguageModelConfig(
        **kwargs | _rotary_kwargs(hf_config, kwargs),
        use_cpu_initialization=True,
        perform_initialization=False,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
    )
    parts = LatentAttentionSubmodules(
        ColumnParallelLinear, ReplicatedLinear, RowParallelLinear, PackedCausalAttention, RMSNorm
    )
    pg = ProcessGroupCollection(tp=group, cp=group)
    return LatentSelfAttention(config, parts, 1, AttnMaskType.causal, pg_collection=pg)


def packing() -> tuple[PackedSequence, torch.Tensor]:
    """The pack and its position ids."""
    first, rejected, other = PROMPT + CHOSEN, PROMPT + CHOSEN + REJECTED, USED
    index = [*range(first), *range(PROMPT), *range(first, rejected), *range(rejected, other)]
    bounds = [[0, first, rejected, other], [0, first, other - OTHER + PROMPT, len(index)]]
    cu_q, cu_kv = (torch.tensor(ends, dtype=torch.int32) for ends in bounds)
    lengths = [range(first), range(PROMPT, PROMPT + REJECTED), range(OTHER), range(PADDING)]
    return (
        PackedSequence(qkv_format="sbhd", cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv, kv_index=torch.tensor(index)),
        torch.tensor([[position for run in lengths for position in run]]),
    )


@pytest.mark.usefixtures("single_rank_group")
@pytest.mark.parametrize(
    ("version", "query_rank", "rope", "interleaved"),
    [
        (2, None, YARN | SCALED, True),  # DeepSeek-V2-Lite
        (2, 36, YARN | FACTORS, True),
        (3, 36, YARN | SCALED, True),  # DeepSeek-V3
        (3, None, PLAIN, True),
        (3, 36, YARN | FACTORS, False),
        (3, None, YARN, False),
    ],
)
def test_equals_transformers(version: int, query_rank: int | None, rope: dict, interleaved: bool) -> None:
    options = {} if version == 2 else {"rope_interleave": interleaved}
    kind, attention, rotary = {
        2: (DeepseekV2Config, v2.DeepseekV2Attention, v2.DeepseekV2RotaryEmbedding),
        3: (DeepseekV3Config, v3.DeepseekV3Attention, v3.DeepseekV3RotaryEmbedding),
    }[version]
    hf_config = kind(**SIZES, q_lora_rank=query_rank, rope_parameters=rope, **options)
    torch.manual_seed(1)
    theirs, ours = attention(hf_config, 0), build(hf_config, interleaved=interleaved)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            # Large enough for attention patterns that are far from uniform.
            weight.normal_(std=0.3) if weight.dim() > 1 else weight.normal_(mean=1.0, std=0.1)
            ours.get_parameter(f"{OURS[name.split('.')[0]]}.weight").copy_(weight)
    hidden = torch.randn(USED + PADDING, 1, 64)
    upstream = torch.randn(USED + PADDING, 64)

    pack, positions = packing()
    angles = RotaryFrequencies(hf_config, torch.device("cpu"), interleaved=interleaved)(positions)
    mine = hidden.clone().requires_grad_()
    out, bias = ours(mine, None, rotary_pos_emb=angles, packed_seq_params=pack)
    assert bias is None
    (out[:, 0] * upstream).sum().backward()

    them = hidden.clone().requires_grad_()
    prompt, chosen, rejected, other, _ = them[:, 0].split([PROMPT, CHOSEN, REJECTED, OTHER, PADDING])
    wanted = []
    for sequence in (torch.cat((prompt, chosen)), torch.cat((prompt, rejected)), other):
        count = len(sequence)
        mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
        places = rotary(hf_config)(sequence, torch.arange(count)[None])
        result, _ = theirs(sequence[None], position_embeddings=places, attention_mask=mask)
        wanted.append(result[0])
    wanted[1] = wanted[1][PROMPT:]
    expected = torch.cat(wanted)
    (expected * upstream[:USED]).sum().backward()

    assert (out[:USED, 0] - expected).abs().max() / expected.abs().max() < 1e-5
    assert not out[USED:].any()
    assert mine.grad is not None
    assert them.grad is not None
    assert (mine.grad - them.grad).norm() / them.grad.norm() < 1e-5
    for name, weight in theirs.named_parameters():
        gradient = ours.get_parameter(f"{OURS[name.split('.')[0]]}.weight").grad
        assert (gradient - weight.grad).norm() / weight.grad.norm() < 1e-5, name
