"""Converts checkpoints.

    tgdpo convert to-megatron --hf DIR --out DIR
    tgdpo convert to-hf --megatron DIR --out DIR

With ``--nproc N``, or under torchrun or srun, the ranks divide the work.
"""

import sys
from collections.abc import Sequence

from tgdpo.commands import CONVERSIONS, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a conversion; ``None`` means this process's arguments. Exit status: its own; 2 for an unknown one."""
    about = "Checkpoints from Hugging Face to Megatron and back; never in memory whole."
    return run_command("tgdpo convert", about, CONVERSIONS, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
