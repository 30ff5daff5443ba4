"""Tokenises preference pairs (JSON, JSONL, Parquet, Arrow) into a Megatron-Core dataset for TGDPO and DPO training.

    python -m tgdpo.preprocess --input pairs.jsonl --tokenizer hf_model_dir --output data/pairs

writes ``data/pairs.{bin,idx,source.npy,manifest.json}``; give ``data/pairs`` to training as ``data.train``. The
layout of the records is detected; docs/data.md describes each, the truncation rules, what is dropped and the manifest.
"""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from megatron_tgdpo.data.options import OVERLONG_PROMPT_RULES, PreprocessOptions, json_object
from megatron_tgdpo.data.summary import lost_ends_warning, summary
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.hub import MODEL, fetch, hub_name, local_path


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ``None`` means this process's."""
    parser = argparse.ArgumentParser(prog="python -m tgdpo.preprocess", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="JSON, JSONL, Parquet or Arrow files, directories of them, globs, datasets of the Hub",
    )
    parser.add_argument("--split", help="of a directory or dataset of the Hub that holds several")
    parser.add_argument("--subset", help="of one whose README declares several")
    parser.add_argument(
        "--tokenizer", required=True, help="Hugging Face directory, model of the Hub, or SentencePiece .model file"
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="prefix of the files to write")
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja file replacing the tokenizer's own template")
    parser.add_argument(
        "--template-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="variables for the template, such as '{\"enable_thinking\": false}'",
    )
    parser.add_argument(
        "--columns",
        type=json_object,
        default={},
        metavar="JSON",
        help="by a layout's key, the records' own, such as '{\"prompt\": \"question\"}'",
    )
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
    parser.add_argument(
        "--workers", type=int, default=_usable_cores(), help="processes (default: this machine's cores, %(default)s)"
    )
    parser.add_argument("--strict", action="store_true", help="any pair that would be dropped is an error")
    parser.add_argument(
        "--chosen-only", action="store_true", help="leave rejected responses out, for training with loss.method sft"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that is at PREFIX already")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    given = parse_arguments(arguments)
    # As for Ctrl-C: what was half written is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        manifest = _run(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: no dataset was written", file=sys.stderr)
        return 130
    print(summary(given.output, manifest))
    if (warning := lost_ends_warning(given.output, manifest, manifest["responses"])) is not None:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _run(given: argparse.Namespace) -> dict[str, Any]:
    name = hub_name(given.tokenizer)
    tokenizer = given.tokenizer if name is None else str(local_path(str(fetch(name, MODEL, weights=False))))
    options = PreprocessOptions(
        tokenizer=tokenizer,
        chat_template=given.chat_template,
        template_kwargs=given.template_kwargs,
        columns=given.columns,
        max_length=given.max_length,
        max_prompt_length=given.max_prompt_length,
        overlong_prompt=given.overlong_prompt,
        workers=given.workers,
        strict=given.strict,
        chosen_only=given.chosen_only,
    )
    with warnings.catch_warnings():
        # megatron-core warns of missing GPU libraries, which tokenising does not use.
        warnings.simplefilter("ignore")
        # Here, not above: spawned workers import this module again, and need neither torch nor megatron.
        from megatron_tgdpo.data.preprocess import preprocess
        from megatron_tgdpo.data.sources import Source
    sources = [Source(path, given.split, given.subset) for path in given.input]
    return preprocess(sources, given.output, options, overwrite=given.overwrite)


def _usable_cores() -> int:
    # Not os.cpu_count(): Slurm and containers give a process fewer cores than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
