"""Inputs that show whether two models compute the same, and what transformers makes of them."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from megatron_tgdpo.checkpoints.model_directory import hf_directory
from megatron_tgdpo.errors import UserError, one_line
from megatron_tgdpo.models.families import settings_of
from megatron_tgdpo.models.rotary import longest_exact, rope_layer_types, rope_settings

_TEXT = "The quick brown fox jumps over the lazy dog, then sleeps until the morning comes. "
_USUAL_LENGTH = 512
_LARGEST_DEFAULT = 1024


@dataclass(frozen=True)
class Probe:
    """A named sequence, [tokens] int64."""

    name: str
    tokens: Tensor


@dataclass(frozen=True)
class Reference:
    """transformers' fp32 logits of one probe, [tokens, V]."""

    logits: Tensor

    @property
    def relative_to(self) -> float:
        """Largest absolute logit."""
        return float(self.logits.abs().max())

    def logps(self, tokens: Tensor) -> Tensor:
        """[tokens - 1] log-probs of each next token."""
        predictions = self.logits[:-1].log_softmax(dim=-1)
        return predictions.gather(1, tokens[1:, None])[:, 0]


def spans(hf_config: PretrainedConfig) -> dict[str, int]:
    """Lengths at which the maths of a model changes: a sequence must be longer to show it.

    None that sequences may not pass here (``models/rotary.py: longest_exact``).
    """
    found = {}
    window = settings_of(hf_config).get("window_size")
    if window is not None:
        found["sliding window"] = window[0] + 1
    for kind in rope_layer_types(hf_config) or (None,):
        original = rope_settings(hf_config, kind)[2].get("original_max_position_embeddings")
        if original and int(original) < (longest_exact(hf_config) or math.inf):
            found["original rope length"] = int(original)
    return found


def long_length(hf_config: PretrainedConfig) -> int:
    """Tokens of the long probes: past every span that is short enough to be cheap."""
    past = [length + 64 for length in spans(hf_config).values() if length + 64 <= _LARGEST_DEFAULT]
    most = longest_exact(hf_config) or hf_config.max_position_embeddings
    result: int = min(most, max([_USUAL_LENGTH, *past]))
    return result


def make_probes(hf: Path, hf_config: PretrainedConfig, length: int) -> list[Probe]:
    """Random tokens, long and short, and where there is a tokenizer a long and a short text.

    Raises:
        UserError: ``length`` is beyond what the model is exact for.
    """
    most = longest_exact(hf_config)
    if most is not None and length > most:
        raise UserError(f"--long-tokens {length}: positions are the same for all sequences only up to {most}")
    random = torch.Generator().manual_seed(0)
    probes = [
        Probe(f"{n} random tokens", torch.randint(0, hf_config.vocab_size, (n,), generator=random))
        for n in (length, max(2, length // 16))
    ]
    directory = hf_directory(hf)
    if not (directory / "tokenizer_config.json").is_file():
        return probes
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    for repeats in (length, 1):
        ids = torch.tensor(tokenizer(_TEXT * repeats)["input_ids"][:length], dtype=torch.int64)
        if len(ids) > 1 and int(ids.max()) < hf_config.vocab_size:
            probes.append(Probe(f"a text of {len(ids)} tokens", ids))
    return probes


@torch.no_grad()
def reference_outputs(hf: Path, probes: list[Probe], stored: torch.dtype, device: torch.device) -> list[Reference]:
    """Runs the HF directory through transformers in fp32, one probe at a time.

    Args:
        hf: The HF directory.
        probes: What to run.
        stored: dtype that its weights are rounded to first; the rotary frequencies, a buffer, stay fp32.
        device: Where to run; the logits come back to the CPU.

    Raises:
        UserError: transformers cannot load it.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            hf,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{hf}: transformers cannot load it: {one_line(error)}") from error
    model = model.eval().to(device)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(stored))
    return [Reference(model(probe.tokens[None].to(device)).logits[0].float().cpu()) for probe in probes]
