"""Small random HF Llama directories, with a tokenizer, for tests."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token }} {% endfor %}"


def make_llama(
    path: Path,
    *,
    vocab_size: int = 131,
    tied: bool = False,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    hidden_size: int = 64,
    mlp_size: int = 96,
    layers: int = 4,
    llama3_rope: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
) -> Path:
    """Writes a random Llama with a whitespace tokenizer and a chat template; norms are not 1, so they count.

    With ``llama3_rope`` the original context is 64 tokens, so that short tests go beyond it.

    Returns:
        ``path``.
    """
    rope: dict = {"rope_type": "default", "rope_theta": 10000.0}
    if llama3_rope:
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=mlp_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        **_rope_arguments(rope),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                else:
                    # Large enough for logits and attention patterns that are far from uniform.
                    parameter.mul_(3.0)
    model = model.to(dtype)  # type: ignore[arg-type]
    model.save_pretrained(path, max_shard_size=max_shard_size)
    make_tokenizer(vocab_size).save_pretrained(path)
    return path


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
