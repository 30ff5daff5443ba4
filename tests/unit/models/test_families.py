"""What each family declares, against transformers' own models; and what the families refuse."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import BEYOND, FAMILIES
from megatron_tgdpo.models.families.dense import window_kwargs
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.mapping import expected_shapes, expert_layers, global_parameters, parameter_count
from tests.family_table import NOTES, PAGE, refused
from tests.published_configs import PARAMETERS, PUBLISHED, write_config
from tests.tiny_models import DENSE_OPTIONS, make_model


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_taken(tmp_path: Path, name: str) -> None:
    hf_config = read_hf_config(write_config(tmp_path, PUBLISHED[name]))
    assert parameter_count(hf_config) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("options", "with_experts"),
    [
        ({"mlp_only_layers": [0, 3, 9]}, [False, True, True, False]),
        ({"decoder_sparse_step": 2}, [False, True, False, True]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [False, False, False, True]),
        ({}, [True] * 4),
    ],
)
def test_layers_without_experts_are_those_of_transformers(tmp_path: Path, options: dict, with_experts: list) -> None:
    hf_config = read_hf_config(make_model(tmp_path, "qwen2_moe", weights=False, **options))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    assert parameter_count(hf_config) == sum(parameter.numel() for parameter in model.parameters())
    assert expert_layers(hf_config) == with_experts == [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    # megatron-core numbers the layers in a checkpoint where they differ, and only there.
    stacked = [(one.checkpoint_key, one.index) for one in global_parameters(hf_config) if "linear_qkv.w" in one.key]
    key = "self_attention.linear_qkv.weight"
    numbered = [(f"decoder.layers.{layer}.{key}", ()) for layer in range(4)]
    assert stacked == ([(f"decoder.layers.{key}", (layer,)) for layer in range(4)] if all(with_experts) else numbered)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", DENSE_OPTIONS)
def test_weights_are_those_of_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    hf_config = read_hf_config(make_model(tmp_path, family, tied=tied, layers=2, weights=False))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    assert expected_shapes(hf_config) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    by_layer = {}
    for parameter in global_parameters(hf_config):
        by_layer.setdefault(parameter.key, []).append(parameter.layer)
    assert all(layers in ([None], [0, 1]) for layers in by_layer.values())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_every_key_of_the_config_class_is_decided(family: Any) -> None:
    """A changed value of any key that is neither used nor harmless is refused, whatever the key."""
    model_type = next(c["model_type"] for c in PUBLISHED.values() if family.architecture in c["architectures"])
    kind = type(AutoConfig.for_model(model_type))
    family.check(kind())
    refused = set()
    for key, default in vars(kind()).items():
        changed = kind()
        object.__setattr__(changed, key, not default if isinstance(default, bool) else "another")
        with contextlib.suppress(UserError):
            family.check(changed)
            continue
        refused.add(key)
    # Seed-OSS was trained with dropout; here it is off in every model. ERNIE 4.5 has none.
    assert ("attention_dropout" in refused) != (model_type in ("seed_oss", "ernie4_5"))
    assert ("hidden_activation" if model_type in ("gemma2", "gemma3_text", "vaultgemma") else "hidden_act") in refused
    assert not refused & {"hidden_size", "sliding_window", "bos_token_id", "dtype"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma-2-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma-2-2b", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("Qwen3-8B", {"attention_bias": True}, "attention_bias is True"),
        ("Qwen2.5-7B", {"rope_scaling": {"type": "su", "factor": 4.0}}, "rope type 'su'"),
        ("Qwen2.5-7B", {"layer_types": ["chunked_attention"] * 28}, "chunked_attention"),
        ("Qwen2.5-7B", {"layer_types": ["sliding_attention"] * 28}, "sliding_window is None"),
        ("Mistral-7B-v0.1", {"architectures": ["MixtralForCausalLM"]}, "model_type is 'mistral'"),
        ("Qwen3-8B", {"architectures": ["DeepseekV32ForCausalLM"]}, r"latent attention \(MLA\) that chooses its keys"),
        ("Solar-Open-100B", {"first_k_dense_replace": 1}, "first_k_dense_replace is 1, only 0 is supported, as in tra"),
        ("Solar-Open-100B", {"use_qk_norm": True}, "use_qk_norm is True, only False is supported, as in transformers"),
        ("K-EXAONE-236B-A23B", {"num_shared_experts": 0}, "num_shared_experts is 0"),
        ("K-EXAONE-236B-A23B", {"mlp_layer_types": ["sparse"] * 48}, "first_k_dense_replace is 1, and mlp_layer_types"),
        ("dots.llm1", {"scoring_func": "softmax"}, "scoring_func is 'softmax', only 'noaux_tc' is supported"),
        ("dots.llm1", {"attention_bias": True}, "attention_bias is True"),
        ("GLM-4.5-Air", {"n_group": 3}, "n_group is 3, which does not divide 128 experts into groups"),
        ("GLM-4.5-Air", {"n_group": 32, "topk_group": 1}, "topk_group is 1 of 32 groups with 4 experts each, for 8"),
        ("GLM-4.5-Air", {"n_shared_experts": 0}, "n_shared_experts is 0"),
        ("Qwen3-8B", {"architectures": ["JetMoeForCausalLM"]}, "experts with parts that no family here has"),
        ("OLMoE-1B-7B", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        (
            "DeepSeek-V2-Lite",
            {"topk_method": "noaux_tc"},
            "topk_method is 'noaux_tc', only greedy and group_limited_greedy are supported",
        ),
        ("DeepSeek-V2-Lite", {"n_shared_experts": 0}, "n_shared_experts is 0"),
        ("DeepSeek-V2-Lite", {"first_k_dense_replace": 27}, "none of 27 layers has experts"),
        ("DeepSeek-V2-Lite", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("DeepSeek-V2-Lite", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', only 'softmax' is supported"),
        ("DeepSeek-V2-Lite", {"moe_layer_freq": 2}, "moe_layer_freq is 2, only 1 is supported"),
        ("DeepSeek-V3", {"scoring_func": "softmax"}, "scoring_func is 'softmax', only 'sigmoid' is supported"),
        ("DeepSeek-V3", {"topk_method": "greedy"}, "topk_method is 'greedy', only 'noaux_tc' is supported"),
        ("DeepSeek-V3", {"quantization_config": {"quant_method": "fp8"}}, r"FineGrainedFP8Config\(dequantize=True\)"),
        (
            "GLM-4.7-Flash",
            {"first_k_dense_replace": 2},
            "first_k_dense_replace is 2, and mlp_layer_types says otherwise",
        ),
        ("GLM-4.7-Flash", {"mlp_layer_types": ["sparse"]}, "mlp_layer_types names 1 of 47 layers"),
        ("GLM-4.7-Flash", {"mlp_layer_types": ["linear"] * 47}, "mlp_layer_types has 'linear'"),
        ("Youtu-LLM-2B", {"attention_bias": True}, "attention_bias is True"),
        ("Youtu-LLM-2B", {"kv_lora_rank": 0}, "kv_lora_rank is 0: it must be a positive number"),
        ("Youtu-LLM-2B", {"num_key_value_heads": 4}, "num_key_value_heads is 4, but with latent attention every one"),
        ("Youtu-LLM-2B", {"v_head_dim": 200}, "v_head_dim 200 is more than .* together, 192"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": list(range(48))}, "none of 48 layers has experts"),
        ("Qwen3-30B-A3B", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0: it must be positive"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": [0], "intermediate_size": 0}, "intermediate_size is 0, and some layers"),
        ("Qwen3-30B-A3B", {"num_experts_per_tok": 129}, "num_experts_per_tok is 129 with 128 experts"),
        ("Qwen3-30B-A3B", {"num_experts_per_tok": 1}, "no router could learn"),
        ("Mixtral-8x7B", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ("gpt-oss-20b", {"attention_bias": False}, "attention_bias is False"),
        ("gpt-oss-20b", {"quantization_config": {"quant_method": "mxfp4"}}, r"Mxfp4Config\(dequantize=True\)"),
        ("Qwen3-8B", {"architectures": ["Qwen3NextForCausalLM"]}, "supported are: LlamaForCausalLM, Gemma2"),
        ("Llama-2-7b", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("Qwen3-8B", {"architectures": ["Qwen3_5ForCausalLM"]}, "with gated delta-net layers, which is not supported"),
        ("gemma-3-1b", {"architectures": ["Gemma3ForConditionalGeneration"]}, "with inputs other than text"),
        ("gemma-3-1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma-3-1b", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("Llama-3-8B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported, only 1"),
        ("phi-4", {"resid_pdrop": 0.1}, "resid_pdrop is 0.1"),
        ("phi-4", {"partial_rotary_factor": 0.01}, "partial_rotary_factor 0.01 rotates 1 elements of a head"),
        ("Seed-OSS-36B", {"attention_out_bias": True}, "attention_out_bias is True"),
        ("granite-3.3-8b", {"mlp_bias": True}, "mlp_bias is True"),
        ("granite-3.3-8b", {"logits_scaling": 0}, "logits_scaling is 0, which is no value for it in a granite model"),
        ("granite-3.3-8b", {"torch_dtype": "x"}, "torch_dtype is 'x', which is no value for it"),
        ("Mixtral-8x7B", {"num_local_experts": None}, "num_local_experts is None, which is no value for it"),
        ("Llama-3-8B", {"rope_theta": {}}, r"rope_theta is \{\}: it must be a positive number"),
        ("Llama-3-8B", {"rope_scaling": 7}, "rope_scaling is 7: it must be a mapping"),
        (
            "Llama-3-8B",
            {"rope_scaling": {"rope_type": "yarn", "factor": "four"}},
            "rope_scaling.factor is 'four': it must be a positive number",
        ),
        (
            "gemma-3-1b",
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": -1}}},
            "rope_parameters.full_attention.factor is -1: it must be a positive number",
        ),
        ("SmolLM3-3B", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 36 layers"),
        ("ERNIE-4.5-0.3B", {"use_bias": True}, "use_bias is True"),
        ("Llama-3-8B", {"num_key_value_heads": 0}, "num_key_value_heads is 0: it must be positive"),
        ("Llama-3-8B", {"num_key_value_heads": 3}, "num_attention_heads 32 is not divisible by num_key_value_heads 3"),
        ("Llama-3-8B", {"num_hidden_layers": 0}, "num_hidden_layers is 0: it must be positive"),
        ("Llama-3-8B", {"intermediate_size": -1}, "intermediate_size is -1: it must be positive"),
    ],
)
def test_what_would_change_the_maths_is_refused(tmp_path: Path, name: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_hf_config(write_config(tmp_path, {**PUBLISHED[name], **changes}))
    assert "\n" not in str(error.value)


def test_reasons_are_of_architectures_that_there_are() -> None:
    names = {name for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in (value,) if isinstance(name, str)}
    assert [part for part in BEYOND if not any(part in name for name in names)] == []
    supported = {family.architecture for family in FAMILIES}
    assert [name for name in supported if any(part in name for part in BEYOND)] == []


def test_the_page_has_what_there_is() -> None:
    """But for its figures, which ``python -m tests.family_table`` measures."""
    page = PAGE.read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `") and "ForCausalLM" in line]
    assert [row.split("`")[1] for row in rows] == [family.architecture for family in FAMILIES]
    assert all(f"| {' | '.join(NOTES[row.split('`')[1]])} |" in row for row in rows)
    assert refused() in page
    readme = (PAGE.parents[1] / "README.md").read_text()
    assert f"[{len(FAMILIES)} architectures](docs/families.md)" in readme
    assert f"[{sum(family.has_experts for family in FAMILIES)} architectures](docs/experts.md)" in readme


def test_an_adapter_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="a LoRA adapter"):
        read_hf_config(tmp_path)


def test_windows() -> None:
    def config(**values: Any) -> Any:
        return SimpleNamespace(num_hidden_layers=3, **values)

    full, sliding = "full_attention", "sliding_attention"
    assert window_kwargs(config()) == {}
    assert window_kwargs(config(sliding_window=None)) == {}
    assert window_kwargs(config(sliding_window=8, layer_types=[full] * 3)) == {}
    everywhere = {"window_size": (7, 0), "window_attn_skip_freq": [1, 1, 1]}
    assert window_kwargs(config(sliding_window=8)) == everywhere
    some = window_kwargs(config(sliding_window=8, layer_types=[sliding, full, sliding]))
    assert some == {"window_size": (7, 0), "window_attn_skip_freq": [1, 0, 1]}
    with pytest.raises(UserError, match="2 entries"):
        window_kwargs(config(sliding_window=8, layer_types=[full] * 2))
