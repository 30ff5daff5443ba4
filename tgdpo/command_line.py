"""Options that several commands have, and how a command ends.

Imports nothing heavy: help, wrong options and missing files are answered before a library is loaded.
"""

import argparse
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints_convert.arguments import DTYPE_NAMES
from megatron_tgdpo import console
from megatron_tgdpo.data.options import OVERLONG_PROMPT_RULES, PreprocessOptions, json_object
from megatron_tgdpo.errors import UserError

if TYPE_CHECKING:
    from megatron_tgdpo.config.schema import ParallelConfig

MODEL_HELP = "HF directory, model of the Hub, Megatron checkpoint, PEFT adapter, or output directory of a run"


def positive(text: str) -> int:
    """An option's whole number above zero."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def not_negative(text: str) -> int:
    """An option's whole number from zero."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def positive_number(text: str) -> float:
    """An option's finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def add_model_arguments(
    parser: argparse.ArgumentParser, *, temperature: float | None, max_new_tokens: int | None
) -> None:
    """Adds the options that say which model samples, and how; None for defaults that depend on something else."""
    parser.add_argument("--model", type=Path, required=True, metavar="MODEL", help=MODEL_HELP)
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
    add_processes_argument(parser)


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


def add_length_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which tokens of a pair are kept; `PreprocessOptions` says what is out of range."""
    parser.add_argument(
        "--max-length",
        type=int,
        default=PreprocessOptions.max_length,
        help="most tokens of prompt plus one response (default: %(default)s)",
    )
    parser.add_argument(
        "--max-prompt-length",
        type=int,
        default=PreprocessOptions.max_prompt_length,
        help="most tokens of the prompt (default: no limit)",
    )
    parser.add_argument(
        "--overlong-prompt",
        choices=OVERLONG_PROMPT_RULES,
        default=PreprocessOptions.overlong_prompt,
        help="a prompt above --max-prompt-length keeps its last tokens, is dropped, or stops the run "
        "(default: %(default)s)",
    )


def preprocess_options(given: argparse.Namespace, tokenizer: str, **others: Any) -> PreprocessOptions:
    """What :func:`add_template_arguments`, :func:`add_columns_argument` and :func:`add_length_arguments` ask of data.

    Raises:
        UserError: A number is out of range.
    """
    return PreprocessOptions(
        tokenizer=tokenizer,
        chat_template=given.chat_template,
        template_kwargs=given.template_kwargs,
        columns=given.columns,
        max_length=given.max_length,
        max_prompt_length=given.max_prompt_length,
        overlong_prompt=given.overlong_prompt,
        **others,
    )


def add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options about weights in memory and on disk."""
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of weights (default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--scratch", type=Path, help="where a Megatron checkpoint is exported to for the time")


def add_processes_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option that `generation/workers.py: process_count` takes."""
    parser.add_argument("--nproc", type=positive, metavar="N", help="processes (default: one a GPU; on a CPU, 1)")


def check_temperature(given: argparse.Namespace) -> None:
    """Refuses a ``--temperature`` that is out of range; None is left out.

    Raises:
        UserError: It is.
    """
    if given.temperature is not None and not 0 <= given.temperature < math.inf:
        raise UserError(f"--temperature is {given.temperature}: it must be finite and not negative")


def check_sampling(given: argparse.Namespace) -> None:
    """Refuses numbers of :func:`add_model_arguments` that are out of range.

    Raises:
        UserError: One is.
    """
    check_temperature(given)
    if not 0 < given.top_p <= 1:
        raise UserError(f"--top-p is {given.top_p}: it must be above 0 and at most 1")


def check_present(given: argparse.Namespace, *options: str) -> None:
    """Refuses options (``--chat-template``) that name files or directories which are not there; None is left out.

    Raises:
        UserError: One does.
    """
    for option in options:
        path = getattr(given, option.lstrip("-").replace("-", "_"))
        if path is not None and not Path(path).exists():
            raise UserError(f"{option} {path}: no such file or directory")


def find_models(given: argparse.Namespace, *options: str, weights: bool = True) -> None:
    """Puts, in options (``--model``) that name models or lists of them, the directories they mean; None is left out.

    Args:
        given: The command line.
        options: Their names.
        weights: Whether weights are wanted of a model of the Hub.

    Raises:
        UserError: One means no model, see :func:`~megatron_tgdpo.checkpoints.find_model.find_model`.
    """
    for option in options:
        name = option.lstrip("-").replace("-", "_")
        text = getattr(given, name)
        if isinstance(text, list):
            setattr(given, name, [find_whole_model(one, option, weights=weights) for one in text])
        elif text is not None:
            setattr(given, name, find_whole_model(text, option, weights=weights))


def find_whole_model(text: str | Path, option: str, *, weights: bool = True) -> Path:
    """A model that can be run, from what an option names: as it is, or once a checkpoint is exported.

    An adapter is one, of a LoRA run or of ``peft``, where its base model is there. With ``weights`` false, for a model
    that is not run, its base is not looked for.

    Raises:
        UserError: There is none; the message begins with the option.
    """
    from megatron_tgdpo.checkpoints.find_model import find_model, naming

    found = find_model(text, option, weights=weights, adapter=True)
    # Only now: this takes the seconds of torch's import.
    from megatron_tgdpo.checkpoints.model_directory import is_peft_adapter

    if weights and is_peft_adapter(found):
        from checkpoints_convert.merge import find_base

        with naming(option):
            find_base(found, None)
    return found


def check_ranks(parallel: "ParallelConfig", ranks: int) -> None:
    """Refuses a number of ranks that the layout cannot be made of, before any of them is started.

    Raises:
        UserError: It is one; the message has the nearest that can be.
    """
    from megatron_tgdpo.distributed.layout import make_layout

    make_layout(
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        parallel.sequence_parallel,
        ranks,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
    )


def check_scratch(given: argparse.Namespace) -> None:
    """Refuses a ``--scratch`` that is no directory.

    Raises:
        UserError: It is none.
    """
    if given.scratch is not None and not given.scratch.is_dir():
        raise UserError(f"--scratch {given.scratch}: no such directory")


def run(action: Callable[[], object], *, interrupted: str = "start the same command again to continue") -> int:
    """Runs a command; bad input ends it with one line. Returns the exit status.

    Args:
        action: The command.
        interrupted: What is said after ``interrupted:`` when Ctrl-C ends it.
    """
    console.configure()
    # As for Ctrl-C: temporary exports and what was half written are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130
    return 0
