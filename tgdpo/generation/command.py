"""Options and error handling that the generating commands share."""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_tgdpo.data.options import json_object
from megatron_tgdpo.data.tokenizers import Tokenizer
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.dtypes import DTYPES
from tgdpo.generation.models import fingerprint, hf_directory
from tgdpo.generation.sampling import Sampler, make_sampler


def positive(text: str) -> int:
    """An option's whole number above zero."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def add_model_arguments(
    parser: argparse.ArgumentParser, *, temperature: float | None, max_new_tokens: int | None
) -> None:
    """Adds the options that say which model samples, and how; None for defaults that depend on something else."""
    parser.add_argument(
        "--model", type=Path, required=True, help="HF directory, Megatron checkpoint or training output directory"
    )
    add_template_arguments(parser)
    default = "as the benchmark does" if temperature is None else "%(default)s"
    parser.add_argument(
        "--temperature", type=float, default=temperature, help=f"0 takes the likeliest token (default: {default})"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus of each token (default: %(default)s, all)")
    default = "as the benchmark does" if max_new_tokens is None else "%(default)s"
    parser.add_argument(
        "--max-new-tokens", type=positive, default=max_new_tokens, help=f"limit of an answer (default: {default})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument(
        "--batch", type=positive, default=8, help="prompts that are answered together (default: %(default)s)"
    )
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers", help="what generates")
    add_precision_arguments(parser)


def add_template_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options about the chat template."""
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja file replacing the tokenizer's own template")
    parser.add_argument(
        "--template-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="variables for the template, such as '{\"enable_thinking\": false}'",
    )


def add_columns_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option that maps keys of records."""
    parser.add_argument(
        "--columns",
        type=json_object,
        default={},
        metavar="JSON",
        help="by a layout's key, the records' own, such as '{\"prompt\": \"question\"}'",
    )


def add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options about weights in memory and on disk."""
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of weights (default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--scratch", type=Path, help="where a Megatron checkpoint is exported to for the time")


def sampling_settings(
    given: argparse.Namespace, tokenizer: Tokenizer, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What the answers depend on, for the journal. The batch is part of it: it changes the rounding.

    Raises:
        UserError: A value is out of range.
    """
    if given.temperature is not None and given.temperature < 0:
        raise UserError(f"--temperature is {given.temperature}: it must not be negative")
    if not 0 < given.top_p <= 1:
        raise UserError(f"--top-p is {given.top_p}: it must be above 0 and at most 1")
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


@contextmanager
def open_sampler(
    given: argparse.Namespace, tokenizer: Tokenizer, dtype: torch.dtype, device: torch.device
) -> Iterator[Sampler]:
    """The model of the command line, ready to sample; a Megatron checkpoint is exported for the time."""
    with hf_directory(given.model, given.scratch) as directory:
        yield make_sampler(
            given.backend,
            directory,
            tokenizer,
            top_p=given.top_p,
            max_new_tokens=given.max_new_tokens,
            dtype=dtype,
            device=device,
        )


def run(action: Callable[[], object]) -> int:
    """Runs a command; bad input ends it with one line. Returns the exit status."""
    # As for Ctrl-C: temporary exports are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: start the same command again to continue", file=sys.stderr)
        return 130
    return 0


def print_json(values: dict[str, Any]) -> None:
    """Prints figures for people and programs."""
    print(json.dumps(values, indent=2))
