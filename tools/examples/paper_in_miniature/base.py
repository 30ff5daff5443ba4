"""The language's tokenizer, a token a word, and a small Llama with random weights, as an HF directory."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tools.examples.paper_in_miniature.language import words
from tools.examples.quickstart.tokenizer import ASSISTANT, USER, write_tokenizer

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", USER, ASSISTANT]
MAX_TOKENS = 64


def write_base(out: Path, seed: int) -> None:
    """Writes the directory; the weights follow from the seed."""
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(_tokenizer(), out, MAX_TOKENS)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(words()),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
        pad_token_id=SPECIAL.index("<pad>"),
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(out, safe_serialization=True)


def _tokenizer() -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer
