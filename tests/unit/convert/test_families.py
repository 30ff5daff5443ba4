"""What each family declares, against transformers' own models; and what the families refuse."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoints_convert.families import FAMILIES
from checkpoints_convert.families.dense import window_kwargs
from checkpoints_convert.mapping import expected_shapes, global_parameters, parameter_count
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.hf_config import read_hf_config
from tests.tiny_models import FAMILY_OPTIONS, make_model

# From the models' own config.json (shortened): what people will bring.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32000,
    },
    "Llama-3.2-3B": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 24,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 107],
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
        "vocab_size": 256000,
    },
    "Qwen2.5-7B": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
}
PARAMETERS = {
    "Llama-2-7b": 6_738_415_616,
    "Llama-3.2-3B": 3_212_749_824,
    "gemma-2-2b": 2_614_341_888,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-8B": 8_190_735_360,
    "Mistral-7B-v0.1": 7_241_732_096,
}


def written(path: Path, config: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_taken(tmp_path: Path, name: str) -> None:
    hf_config = read_hf_config(written(tmp_path, PUBLISHED[name]))
    assert parameter_count(hf_config) == PARAMETERS[name]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILY_OPTIONS)
def test_weights_are_those_of_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    hf_config = read_hf_config(make_model(tmp_path, family, tied=tied, layers=2))
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
    assert "attention_dropout" in refused
    assert ("hidden_activation" if model_type == "gemma2" else "hidden_act") in refused
    assert not refused & {"hidden_size", "sliding_window", "bos_token_id", "dtype"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma-2-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma-2-2b", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("Qwen3-8B", {"attention_bias": True}, "attention_bias is True"),
        ("Qwen2.5-7B", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ("Qwen2.5-7B", {"layer_types": ["chunked_attention"] * 28}, "chunked_attention"),
        ("Qwen2.5-7B", {"layer_types": ["sliding_attention"] * 28}, "sliding_window is None"),
        ("Mistral-7B-v0.1", {"architectures": ["MixtralForCausalLM"]}, "mixture of experts"),
        ("Qwen3-8B", {"architectures": ["Qwen3MoeForCausalLM"]}, "mixture of experts"),
        ("Qwen3-8B", {"architectures": ["Qwen3NextForCausalLM"]}, "supported are: LlamaForCausalLM, Gemma2"),
        ("Llama-2-7b", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_what_would_change_the_maths_is_refused(tmp_path: Path, name: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_hf_config(written(tmp_path, {**PUBLISHED[name], **changes}))
    assert "\n" not in str(error.value)


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
