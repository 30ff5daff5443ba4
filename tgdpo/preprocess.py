"""Tokenises preference pairs (JSON, JSONL, Parquet, Arrow) into a Megatron-Core dataset for TGDPO and DPO training.

    tgdpo preprocess --input pairs.jsonl --tokenizer hf_model_dir --output data/pairs

writes ``data/pairs.{bin,idx,source.npy,manifest.json}``; give ``data/pairs`` to training as ``data.train``. The
layout of the records is detected; docs/data.md describes each, the truncation rules, what is dropped and the manifest.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from megatron_tgdpo.checkpoints.find_model import naming
from megatron_tgdpo.data.summary import lost_ends_warning, summary
from megatron_tgdpo.storage.hub import MODEL, fetch, hub_name, local_path
from tgdpo.command_line import (
    add_columns_argument,
    add_length_arguments,
    add_template_arguments,
    check_present,
    preprocess_options,
    run,
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ``None`` means this process's."""
    parser = argparse.ArgumentParser(prog="tgdpo preprocess", description=(__doc__ or "").splitlines()[0])
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
    add_template_arguments(parser)
    add_columns_argument(parser)
    add_length_arguments(parser)
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
    return run(lambda: _run(given), interrupted="no dataset was written")


def _run(given: argparse.Namespace) -> None:
    options = preprocess_options(
        given, given.tokenizer, workers=given.workers, strict=given.strict, chosen_only=given.chosen_only
    )
    check_present(given, "--chat-template")
    name = hub_name(given.tokenizer)
    if name is not None:
        with naming("--tokenizer"):
            pinned = fetch(name, MODEL, weights=False)
        options = replace(options, tokenizer=str(local_path(str(pinned))))
    # Here, not above: spawned workers import this module again, and need neither torch nor megatron.
    from megatron_tgdpo.data.preprocess import preprocess
    from megatron_tgdpo.data.sources import Source

    sources = [Source(path, given.split, given.subset) for path in given.input]
    manifest = preprocess(sources, given.output, options, overwrite=given.overwrite)
    print(summary(given.output, manifest))
    warning = lost_ends_warning(given.output, manifest["truncated"], manifest["responses"], options.max_length)
    if warning is not None:
        print(f"WARNING: {warning}", file=sys.stderr)
    print(f"{given.output}: written; to train on it: data.train={given.output}")


def _usable_cores() -> int:
    # Not os.cpu_count(): Slurm and containers give a process fewer cores than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
