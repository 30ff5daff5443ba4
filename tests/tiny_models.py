"""Small random HF directories of every family, with a tokenizer, for tests."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token }} {% endfor %}"


# What makes each family different, at sizes where it counts in short tests: windows shorter than a sequence, softcaps
# that bend, a head size that is not hidden / heads.
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "sliding_window": 24,
    },
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
    "qwen3": {"head_dim": 32},
    "mistral": {"head_dim": 32, "sliding_window": 24},
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# Families with experts, which under tensor parallelism train with sequence parallelism only.
EXPERT_OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
        "norm_topk_prob": False,
    },
    "mixtral": {"head_dim": 32, "sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "glm4_moe": {
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        # Two of four groups with two experts each.
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
    },
    "solar_open": {
        "head_dim": 32,
        "attention_bias": True,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.7,
        "rope_parameters": {**_YARN, "rope_theta": 10000.0},
    },
    "gpt_oss": {
        "head_dim": 32,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        # Reached by a good part of the activations.
        "swiglu_limit": 1.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        },
    },
}

# Every size another; the range is what other families have.
_LATENT = {
    "initializer_range": 0.02,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
# The same with some layers that have no experts.
MIXED_OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3_moe-mixed": {"family": "qwen3_moe", "mlp_only_layers": [0]},
    "qwen2_moe-mixed": {"family": "qwen2_moe", "decoder_sparse_step": 2},
    "deepseek_v2": {
        "family": "deepseek_v2",
        **_LATENT,
        "q_lora_rank": None,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "moe_intermediate_size": 48,
        "routed_scaling_factor": 1.5,
        "rope_parameters": {**_YARN, "rope_theta": 10000.0, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": {
        "family": "deepseek_v3",
        **_LATENT,
        "q_lora_rank": 36,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "moe_intermediate_size": 48,
        "routed_scaling_factor": 1.5,
        "rope_parameters": {**_YARN, "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "dots1": {
        "family": "dots1",
        "head_dim": 32,
        "first_k_dense_replace": 1,
        "sliding_window": 24,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
    },
    # The first layer of these two is dense by default.
    "exaone_moe": {
        "family": "exaone_moe",
        "head_dim": 32,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 48,
    },
    "glm4_moe_lite": {
        "family": "glm4_moe_lite",
        **_LATENT,
        "q_lora_rank": 36,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 48,
    },
}


_TYPES = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
# The same of families that are tested on fewer layouts (tests/distributed/test_families.py).
MORE_FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        **_TYPES,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 5.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        },
    },
    "phi3": {
        "sliding_window": 24,
        "original_max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
            "long_factor": [2.0] * 6,
            "original_max_position_embeddings": 512,
        },
    },
    "olmo2": {"rms_norm_eps": 1e-3},
    "olmo3": {
        **_TYPES,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {**_YARN, "rope_theta": 10000.0},
        },
    },
    "glm": {"head_dim": 32, "partial_rotary_factor": 0.5},
    "glm4": {"head_dim": 32, "partial_rotary_factor": 0.5, "attention_bias": False},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0], "rope_parameters": {**_YARN, "rope_theta": 10000.0}},
    "ministral": {**_TYPES, "head_dim": 32},
    "ministral3": {
        "head_dim": 32,
        "rope_parameters": {
            **_YARN,
            "original_max_position_embeddings": 128,
            "llama_4_scaling_beta": 0.1,
            "rope_theta": 10000.0,
        },
    },
    "granite": {
        "embedding_multiplier": 2.3,
        "residual_multiplier": 0.35,
        "attention_multiplier": 0.2,
        "logits_scaling": 3.0,
    },
    "seed_oss": {"head_dim": 32, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "exaone4": _TYPES,
    "ernie4_5": {"head_dim": 32},
    "cwm": {**_TYPES, "head_dim": 32},
    "vaultgemma": {
        **_TYPES,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "hyperclovax": {
        "embedding_multiplier": 2.3,
        "residual_multiplier": 0.35,
        "attention_multiplier": 0.2,
        "logits_scaling": 0.5,
        "use_post_norm": True,
    },
    "helium": {"head_dim": 16},
    "minicpm3": {**_LATENT, "q_lora_rank": None, "scale_emb": 2.3, "scale_depth": 0.7, "dim_model_base": 40},
    "youtu": {
        **_LATENT,
        "q_lora_rank": 36,
        "rope_parameters": {**_YARN, "rope_theta": 10000.0, "mscale": 0.5, "mscale_all_dim": 1.5},
    },
}


# All without experts.
DENSE_OPTIONS = FAMILY_OPTIONS | MORE_FAMILY_OPTIONS


def make_model(
    path: Path,
    family: str = "llama",
    *,
    vocab_size: int = 131,
    tied: bool = False,
    heads: int = 4,
    kv_heads: int = 2,
    hidden_size: int = 64,
    mlp_size: int = 96,
    layers: int = 4,
    llama3_rope: bool = False,
    rope: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
    noise: float = 0.0,
    weights: bool = True,
    **options: Any,
) -> Path:
    """Writes a random model with a whitespace tokenizer and a chat template; norms and biases are random too.

    With ``llama3_rope`` the original context is 64 tokens, so that short tests go beyond it; ``rope`` gives other
    settings. ``noise`` changes matrices by so much of themselves. Without ``weights`` there is a config alone.
    ``options`` go into the HF config, over ``FAMILY_OPTIONS``, ``EXPERT_OPTIONS`` and ``MORE_FAMILY_OPTIONS``.

    Returns:
        ``path``.
    """
    rope = {"rope_theta": 10000.0, **(rope or {"rope_type": "default"})}
    if llama3_rope:
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    options = {
        "num_key_value_heads": kv_heads,
        **_rope_arguments(rope),
        **(DENSE_OPTIONS | EXPERT_OPTIONS).get(family, {}),
        **options,
    }
    for name in ("layer_types", "no_rope_layers"):
        if name in options:
            options[name] = options[name][:layers]
    rope = options.get("rope_parameters") or {}
    if "short_factor" in rope:
        count = int(hidden_size // heads * rope["partial_rotary_factor"]) // 2
        factors = {name: rope[name][:count] for name in ("short_factor", "long_factor")}
        options["rope_parameters"] = {**rope, **factors}
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=mlp_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    if not weights:
        config.save_pretrained(path)
        return path
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Biases of all experts are in one matrix.
                if parameter.dim() == 1 or name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                else:
                    # Large enough for logits and attention patterns that are far from uniform.
                    parameter.mul_(3.0)
            for parameter in (p for p in model.parameters() if noise and p.dim() > 1):
                parameter.mul_(1 + noise * torch.randn_like(parameter))
        # In fp32 whatever the model is in.
        biases = [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]
        drawn = [0.03 * torch.randn_like(module.e_score_correction_bias) for module in biases]
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.to(dtype)
    for module, bias in zip(biases, drawn, strict=True):
        module.e_score_correction_bias.data = bias
    model.save_pretrained(path, max_shard_size=max_shard_size)
    make_tokenizer(vocab_size).save_pretrained(path)
    return path


def logits_divisor(config: dict[str, Any]) -> float:
    """What the logits of a ``config.json``'s model are divided by."""
    if config["model_type"] == "minicpm3":
        return float(config["hidden_size"] / config["dim_model_base"])
    scaling: float = config.get("logits_scaling", 1.0)
    return 1 / scaling if config["model_type"] == "hyperclovax" else scaling


def make_llama(path: Path, **options: Any) -> Path:
    """A Llama, see :func:`make_model`."""
    return make_model(path, "llama", **options)


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A whitespace tokenizer whose words are ``w3`` .. ``w{vocab_size - 1}``."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


def _rope_arguments(rope: dict) -> dict:
    """transformers 5 takes ``rope_parameters``; 4.57 ``rope_theta`` and ``rope_scaling``."""
    if hasattr(LlamaConfig(), "rope_parameters"):
        return {"rope_parameters": rope}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else scaling}
