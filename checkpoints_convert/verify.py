"""Checks that an HF directory and a Megatron checkpoint hold the same model: weights to the bit, then their outputs.

    tgdpo verify --hf DIR --megatron DIR [--long-tokens N]

Weights are compared in the checkpoint's stored dtype. Then transformers and this project, both in fp32, compute the
logits, the log-prob of every token and the next token of packed sequences: random tokens and text, long and short. Of a
LoRA run the adapter is compared with a ``peft`` directory, or its base with the adapter added with an HF directory: to
the bit, and no outputs. Exit code 1 if anything differs. With ``--nproc``, or under torchrun or srun, the model may be
split by ``--tensor`` and ``--pipeline``; one rank of the last stage holds the whole HF model for a while.
"""

import argparse
from pathlib import Path

from checkpoints_convert.arguments import check_positive, layout_arguments, run
from megatron_tgdpo.resilience.launch import nproc_argument, start_ranks


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="tgdpo verify", description=__doc__.split("\n")[0])
    parser.add_argument("--hf", type=Path, required=True, help="HF directory, PEFT adapter, or a model of the Hub")
    parser.add_argument("--megatron", type=Path, required=True, help="Megatron checkpoint or training output directory")
    parser.add_argument("--long-tokens", type=int, help="length of the long sequences")
    layout_arguments(parser)
    nproc_argument(parser)
    arguments = parser.parse_args()
    check_positive(arguments, "--long-tokens", "--tensor", "--pipeline", "--timeout-minutes")
    start_ranks(arguments.nproc)
    # Only now: these imports take seconds, a wrong option should not.
    from checkpoints_convert.compare_outputs import verify

    verify(arguments)


if __name__ == "__main__":
    run(main)
