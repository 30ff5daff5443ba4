"""Turns a YAML of the TGDPO reference code (LLaMA-Factory's keys) into this project's configuration.

    tgdpo import-config REFERENCE.yaml --ranks 8 --out config.yaml
        (--dataset-info dataset_info.json | --train pairs.jsonl [--validation F])

``--ranks`` is the number of GPUs that the reference run used: its batch size is per device, ours is global. Datasets
have names there, which ``dataset_info.json`` explains, and paths here. A key is translated, or known to change nothing
that is trained, or refused by name: ``--ignore KEY`` leaves it out. The layout is the planner's for that many GPUs.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoints_convert.arguments import check_positive
from tgdpo.command_line import check_present, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    args = _parser().parse_args(arguments)
    return run(lambda: _main(args))


def _main(args: argparse.Namespace) -> None:
    check_positive(args, "--ranks", "--gpus-per-node", "--gpu-memory-gib")
    check_present(args, "--dataset-info")
    # Only now: these imports take seconds, a wrong option should not.
    from tgdpo.llamafactory.conversion import import_config

    lines = import_config(args)
    processes = min(args.ranks, args.gpus_per_node)
    print("\n".join([*lines, f"{args.out}: written"]))
    file = shlex.quote(str(args.out))
    print(f"what would stop it: tgdpo doctor {file} --nproc {processes}")
    print(f"train: tgdpo train {file} --nproc {processes}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tgdpo import-config", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("reference", type=Path)
    parser.add_argument("--ranks", type=int, required=True, help="GPUs of the reference run, and of this one")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default %(default)s")
    parser.add_argument("--gpu-memory-gib", type=float, default=80.0, help="of a GPU; default %(default)s")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset-info", type=Path, help="dataset_info.json, to look up the YAML's dataset names")
    source.add_argument("--train", help="training pairs")
    parser.add_argument("--validation", help="validation pairs")
    parser.add_argument("--ignore", action="append", default=[], metavar="KEY", help="leave a key out; may be repeated")
    parser.add_argument(
        "--max-prompt-length",
        action="store_true",
        help="take max_prompt_length over, which the authors' code never reads",
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write; a chat template goes beside it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
