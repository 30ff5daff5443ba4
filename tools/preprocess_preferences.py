"""Tokenises preference pairs (JSON, JSONL, Parquet) into a Megatron-Core dataset for TGDPO and DPO training.

    python -m tools.preprocess_preferences --input pairs.jsonl --tokenizer hf_model_dir --output data/pairs

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
from megatron_tgdpo.errors import UserError


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ``None`` means this process's."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.preprocess_preferences", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON, JSONL or Parquet files")
    parser.add_argument(
        "--tokenizer", required=True, help="Hugging Face tokenizer directory or SentencePiece .model file"
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


def summary(prefix: str, manifest: dict[str, Any]) -> str:
    """The manifest in a few readable lines."""
    dropped = manifest["dropped"]
    reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
    cuts = ", ".join(f"{what} {count}" for what, count in manifest["truncated"].items())
    lines = [
        f"{prefix}: {manifest['pairs']:,} pairs, {manifest['lengths']['pair']['total']:,} tokens in pairs",
        f"dropped: {sum(dropped.values()):,}" + (f" ({reasons})" if reasons else ""),
        f"truncated: {cuts or 'nothing'}",
        f"{'tokens':<10}{'min':>8}{'median':>9}{'mean':>9}{'p95':>9}{'max':>8}",
    ]
    for name, column in manifest["lengths"].items():
        middle = f"{column['median']:>9.0f}{column['mean']:>9.1f}{column['p95']:>9.0f}"
        lines.append(f"{name:<10}{column['min']:>8}{middle}{column['max']:>8}")
    return "\n".join(lines)


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
    return 0


def _run(given: argparse.Namespace) -> dict[str, Any]:
    options = PreprocessOptions(
        tokenizer=given.tokenizer,
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
    return preprocess(given.input, given.output, options, overwrite=given.overwrite)


def _usable_cores() -> int:
    # Not os.cpu_count(): Slurm and containers give a process fewer cores than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
