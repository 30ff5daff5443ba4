"""What models with experts take: parameters by hand, layouts that split experts, traffic of their exchange."""

from pathlib import Path

import pytest
from transformers import PretrainedConfig

from megatron_tgdpo.checkpoints.adapter_directory import Lora
from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.divisibility import check_divides, check_layout
from megatron_tgdpo.models.families import family_of
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.mapping import active_parameter_count
from megatron_tgdpo.planning.activations import Pack, layer_activations
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Batch, Job
from megatron_tgdpo.planning.layouts import all_plans, make_plan
from megatron_tgdpo.planning.memory import adapter_parameters, expert_parameters, stage_parameters
from megatron_tgdpo.planning.model_flops import linear_flops
from megatron_tgdpo.planning.report import plan_text
from megatron_tgdpo.planning.traffic import expert_bytes
from tests.published_configs import PUBLISHED, write_config

# Of Qwen3-30B-A3B: query, key, value and output, two norms and two of heads, a router; one expert.
_ATTENTION = 2048 * (32 + 2 * 4 + 32) * 128
_BESIDE = _ATTENTION + 2 * 2048 + 2 * 128 + 128 * 2048
_EXPERT = 3 * 768 * 2048
_ENDS = 2 * 151936 * 2048 + 2048


@pytest.fixture
def qwen(tmp_path: Path) -> PretrainedConfig:
    return read_hf_config(write_config(tmp_path, PUBLISHED["Qwen3-30B-A3B"]))


def test_a_token_meets_its_experts_only(qwen: PretrainedConfig) -> None:
    assert active_parameter_count(qwen) == _ENDS + 48 * (_BESIDE + 8 * _EXPERT)


def test_ranks_hold_their_experts(qwen: PretrainedConfig) -> None:
    for tensor, expert, expert_tensor, held in ((1, 8, 1, 16), (2, 8, 1, 16), (2, 1, None, 64), (4, 2, 4, 16)):
        layout = make_layout(tensor, 2, 1, True, 16, expert=expert, expert_tensor=expert_tensor)
        assert expert_parameters(qwen, layout, 1) == 24 * held * _EXPERT
    whole = make_layout(1, 1, 1, False, 8, expert=8)
    assert stage_parameters(qwen, whole, 0) == _ENDS + 48 * (_BESIDE + 16 * _EXPERT)


def test_layers_without_experts_count_as_dense_ones(tmp_path: Path) -> None:
    changes = {"mlp_only_layers": [0, 1, 2]}
    mixed = read_hf_config(write_config(tmp_path, {**PUBLISHED["Qwen3-30B-A3B"], **changes}))
    dense = _ATTENTION + 2 * 2048 + 2 * 128 + 3 * 6144 * 2048
    layout = make_layout(1, 2, 1, False, 16, expert=8)
    assert active_parameter_count(mixed) == _ENDS + 3 * dense + 45 * (_BESIDE + 8 * _EXPERT)
    assert expert_parameters(mixed, layout, 0) == 21 * 16 * _EXPERT
    assert expert_parameters(mixed, layout, 1) == 24 * 16 * _EXPERT
    first = stage_parameters(mixed, layout, 0)
    assert first == 151936 * 2048 + 3 * dense + 21 * (_BESIDE + 16 * _EXPERT)
    lora = Lora(16, 32.0, ("down_proj",))
    of_experts = 21 * 16 * 16 * (768 + 2048)
    assert adapter_parameters(mixed, layout, 0, lora, of_experts=True) == of_experts
    assert adapter_parameters(mixed, layout, 0, lora) == of_experts + 3 * 16 * (6144 + 2048)
    multiplied = 2 * (_ATTENTION + 3 * 6144 * 2048)
    assert linear_flops(mixed, 0) == linear_flops(mixed, 2) == multiplied
    assert linear_flops(mixed, 3) == linear_flops(mixed, 47) == 2 * (_ATTENTION + 128 * 2048 + 8 * _EXPERT)
    pack = Pack(4096, 2048, 2)
    # Each keeps the inputs of its MLP's linears, and its gate and up.
    kept = [layer_activations(mixed, layout, pack, "none", layer) for layer in (2, 3)]
    assert kept[1] - kept[0] == 4096 * 2 * (8 * 2048 + 3 * (8 * 768 - 6144))
    again = [layer_activations(mixed, layout, pack, "mlp", layer) for layer in (2, 3)]
    assert again == [kept[0] - 4096 * 2 * 3 * 6144, kept[1]]
    sent = [sum(count(_job(mixed), layout, "none", stage)) for count in (expert_bytes,) for stage in (0, 1)]
    assert sent[0] / sent[1] == pytest.approx(21 / 24)
    with pytest.raises(UserError, match=r"MLP size 6144 is not divisible by parallel.tensor = 5"):
        check_divides({**family_of(mixed.architectures).config_kwargs(mixed), "num_attention_heads": 40,
                       "num_query_groups": 5}, make_layout(5, 1, 1, True, 5))  # fmt: skip


def test_the_hidden_state_is_kept_once_for_all_adapters_of_latent_attention(tmp_path: Path) -> None:
    """Whether a linear of queries alone has one, or that of keys and values, too."""
    model, layout, tokens = (
        read_hf_config(write_config(tmp_path, PUBLISHED["DeepSeek-V3"])),
        make_layout(1, 1, 1, False, 1),
        4096,
    )
    query, both = (
        layer_activations(model, layout, Pack(tokens, 2048, 2), "none", 5, Lora(16, 32.0, targets)) / (2 * tokens)
        for targets in (("q_proj",), ("q_proj", "k_proj", "v_proj"))
    )
    assert 512 < both - query < 7168  # kv_b's input, and what A made; no other hidden state


def _job(model: PretrainedConfig) -> Job:
    return Job(model, (), Pack(4096, 2048, 2), Batch(128, 2048, 0.5, True), False)


def test_optimizer_state_of_experts_is_split_over_those_that_have_the_same(qwen: PretrainedConfig) -> None:
    job, cluster = _job(qwen), Cluster(2, 8)
    memory = make_plan(job, cluster, make_layout(1, 1, 1, False, 16, expert=8), "full").memory
    dense, experts = _ENDS + 48 * _BESIDE, 48 * 16 * _EXPERT
    assert memory.optimizer == 12 * dense // 16 + 12 * experts // 2
    assert memory.gradients == 4 * (dense + experts)


def test_tokens_travel_to_experts_of_other_ranks_only(qwen: PretrainedConfig) -> None:
    job, cluster = _job(qwen), Cluster(1, 8)
    alone, split = (make_plan(job, cluster, make_layout(1, 1, 1, False, 8, expert=n), "none") for n in (1, 8))
    assert alone.traffic.expert == 0
    packs = job.micro_batches(split.layout)
    # There and back, forward and backward, for 7 of 8 of a token's experts.
    assert split.traffic.expert == pytest.approx(packs * 2 * 2 * 48 * 4096 * 7 * 2048 * 2)
    assert split.time.total > split.time.expert > 0
    assert "of which a token meets 3,353,032,704" in plan_text(split, job, cluster)


def test_plans_split_experts_inside_a_node(qwen: PretrainedConfig) -> None:
    plans = all_plans(_job(qwen), Cluster(1, 8))
    assert {plan.layout.expert for plan in plans} == {1, 2, 4, 8}
    assert all(plan.layout.expert_shards == 1 for plan in plans if plan.layout.expert > 1)
    assert plans[0].fits
    assert plans[0].layout.expert > 1


def test_layouts_that_cannot_be_are_refused(qwen: PretrainedConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"8 ranks of a stage .* 2 x 8 = 16: lower parallel.expert, or set"):
        make_layout(2, 1, 1, True, 8, expert=8)
    with pytest.raises(UserError, match=r"128 experts are not divisible by parallel.expert = 3: set"):
        check_layout({"policy": qwen}, make_layout(1, 1, 1, False, 6, expert=3))
    with pytest.raises(UserError, match=r"expert size 768 is not divisible by parallel.expert_tensor = 5"):
        check_layout({"policy": qwen}, make_layout(1, 1, 1, False, 5, expert_tensor=5))
    with pytest.raises(UserError, match=r"every token 2 times: set parallel.sequence_parallel=true"):
        check_layout({"policy": qwen}, make_layout(2, 1, 1, False, 2))
    dense = read_hf_config(write_config(tmp_path, PUBLISHED["Qwen3-8B"]))
    with pytest.raises(UserError, match="no model has experts"):
        check_layout({"policy": dense}, make_layout(1, 1, 1, False, 2, expert=2))
    check_layout({"policy": dense, "guide": qwen}, make_layout(1, 1, 1, False, 2, expert=2))
