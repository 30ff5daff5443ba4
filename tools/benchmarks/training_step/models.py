"""Random-weight Llamas of named sizes, as HF directories.

A size names the parameters outside embedding and output weight, so that it is the same transformer at any vocabulary.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints_convert.export_adapter import peft_config
from megatron_tgdpo.checkpoints.adapter_directory import PREFIX, Lora
from megatron_tgdpo.checkpoints.model_directory import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.adapter_layout import peft_shapes
from tools.benchmarks.training_step.problem import LORA_ALPHA, LORA_RANK

# Logits of a random model then differ by about a nat, not by hundredths, so that losses tell variants apart.
_WEIGHT_STD = 0.05


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama; every layer has ``heads`` query heads and ``groups`` key/value heads of 64."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    groups: int


SHAPES = {
    "tiny": ModelShape(layers=2, hidden=128, mlp=320, heads=2, groups=1),
    "20m": ModelShape(layers=12, hidden=384, mlp=1152, heads=6, groups=2),
    "60m": ModelShape(layers=14, hidden=640, mlp=1728, heads=10, groups=2),
    "160m": ModelShape(layers=14, hidden=1024, mlp=2816, heads=16, groups=4),
}


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one model: of layers and norms, and of embedding and output weight (once if they are tied)."""

    layers: int
    embeddings: int

    @property
    def total(self) -> int:
        return self.layers + self.embeddings


def llama_config(shape: ModelShape, vocabulary: int, *, tied: bool, max_length: int) -> LlamaConfig:
    """The HF config of a shape; ``max_length`` is the most positions a sequence has."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=max_length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=_WEIGHT_STD,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def write_model(path: Path, config: LlamaConfig, *, dtype: torch.dtype, seed: int) -> ParameterCount:
    """Writes a random model's config and safetensors, and counts its parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, dtype=dtype)
    model.save_pretrained(path)
    embeddings = {id(weight): weight.numel() for weight in (model.model.embed_tokens.weight, model.lm_head.weight)}
    total = sum(parameter.numel() for parameter in model.parameters())
    return ParameterCount(total - sum(embeddings.values()), sum(embeddings.values()))


def write_adapter(path: Path, base: Path, seed: int) -> None:
    """Writes a ``peft`` directory with random A and B, for every linear of the layers."""
    lora, generator = Lora(LORA_RANK, LORA_ALPHA), torch.Generator().manual_seed(seed)
    hf_config = read_hf_config(base)
    tensors = {
        PREFIX + name: torch.randn(shape, generator=generator) * (0.02 if "lora_B" in name else shape[1] ** -0.5)
        for name, shape in peft_shapes(lora, hf_config).items()
    }
    path.mkdir()
    (path / ADAPTER_CONFIG).write_text(json.dumps(peft_config(lora, str(base), hf_config)), encoding="utf-8")
    safetensors.torch.save_file(tensors, path / ADAPTER_WEIGHTS, metadata={"format": "pt"})
