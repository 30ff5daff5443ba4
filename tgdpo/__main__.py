"""``tgdpo COMMAND ...``, or ``python -m tgdpo COMMAND ...``: all commands of this project; see :mod:`tgdpo.commands`.

On several GPUs: ``tgdpo train CONFIG.yaml --nproc 8``; under srun, and torchrun (``-m tgdpo train``), without it.
"""

import sys
from collections.abc import Sequence

from megatron_tgdpo import __version__
from tgdpo.commands import COMMANDS, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; ``None`` means this process's arguments. Exit status: the command's; 2 for an unknown one."""
    about = "Token-level preference optimisation on Megatron-Core, from a Hugging Face model to an aligned one."
    given = sys.argv[1:] if arguments is None else arguments
    return run_command("tgdpo", about, COMMANDS, given, f"megatron-tgdpo {__version__}")


if __name__ == "__main__":
    sys.exit(main())
