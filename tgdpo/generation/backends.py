"""The samplers by name, and that of a command line."""

import argparse
from pathlib import Path
from typing import Any

import torch

from megatron_tgdpo.data.tokenizers import Tokenizer, load_tokenizer
from tgdpo.generation.models import default_device, dtype_of, fingerprint, load_causal_lm, tokenizer_directory
from tgdpo.generation.sampling import Sampler
from tgdpo.generation.transformers_sampler import TransformersSampler
from tgdpo.generation.vllm_sampler import VllmSampler


def make_generator(
    backend: str,
    directory: Path,
    tokenizer: Tokenizer,
    *,
    top_p: float,
    max_new_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Sampler:
    """Loads a model for one of the backends, ``transformers`` or ``vllm``.

    Raises:
        UserError: The model cannot be loaded, or the backend is not installed.
    """
    if backend == "vllm":
        return VllmSampler(directory, tokenizer, top_p=top_p, max_new_tokens=max_new_tokens, dtype=dtype)
    model = load_causal_lm(directory, dtype, device)
    return TransformersSampler(model, tokenizer, top_p=top_p, max_new_tokens=max_new_tokens)


def sampling_settings(
    given: argparse.Namespace, tokenizer: Tokenizer, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What the answers depend on, for the journal. The batch is part of it: it changes the rounding."""
    return {
        "model": fingerprint(given.model),
        "tokenizer": [tokenizer.fingerprint, tokenizer.template_fingerprint],
        "temperature": given.temperature,
        "top_p": given.top_p,
        "max_new_tokens": given.max_new_tokens,
        "seed": given.seed,
        "batch": given.batch,
        "backend": given.backend,
        "precision": [str(dtype).removeprefix("torch."), device.type],
    }


def make_sampler(given: argparse.Namespace, directory: Path) -> tuple[Sampler, Tokenizer]:
    """The sampler of a command line, and its tokenizer.

    Args:
        given: Its options.
        directory: HF directory of its model.

    Raises:
        UserError: As :func:`make_generator`.
    """
    device = default_device()
    tokenizer = load_tokenizer(str(tokenizer_directory(given.model)), given.chat_template, given.template_kwargs)
    sampler = make_generator(
        given.backend,
        directory,
        tokenizer,
        top_p=given.top_p,
        max_new_tokens=given.max_new_tokens,
        dtype=dtype_of(given.dtype, device),
        device=device,
    )
    return sampler, tokenizer
