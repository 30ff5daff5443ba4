"""Converts an HF directory to a Megatron checkpoint, of any size on any machine: it is never in memory whole.

    tgdpo convert to-megatron --hf MODEL --out DIR [--dtype bf16|fp16|fp32]

``--hf`` is an HF directory or a model of the Hub, OWNER/NAME. With ``--nproc``, or under torchrun or srun, the ranks
divide the work; the result does not depend on their number. Without ``--dtype`` the stored one is kept, and weights of
several become fp32.
"""

import argparse
from pathlib import Path

from checkpoints_convert.arguments import DTYPE_NAMES, check_positive, run, timeout_argument
from megatron_tgdpo.resilience.launch import nproc_argument, start_ranks


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="tgdpo convert to-megatron", description=__doc__.split("\n")[0])
    parser.add_argument("--hf", type=Path, required=True, help="HF directory with safetensors, or a model of the Hub")
    parser.add_argument("--out", type=Path, required=True, help="Megatron checkpoint directory to make")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of the stored weights (default: as in the HF files)")
    timeout_argument(parser)
    nproc_argument(parser)
    arguments = parser.parse_args()
    check_positive(arguments, "--timeout-minutes")
    start_ranks(arguments.nproc)
    # Only now: these imports take seconds, a wrong option should not.
    import torch.distributed as dist

    from checkpoints_convert.command_line import find_hf, join_ranks
    from checkpoints_convert.import_hf import import_hf
    from megatron_tgdpo.models.hf_config import read_hf_config
    from megatron_tgdpo.storage.atomic_directory import refuse_existing
    from megatron_tgdpo.storage.dtypes import DTYPES

    hf = find_hf(arguments.hf)
    hf_config = read_hf_config(hf)
    refuse_existing(arguments.out)
    join_ranks(arguments.timeout_minutes)
    summary = import_hf(hf, arguments.out, hf_config, DTYPES.get(arguments.dtype))
    if dist.get_rank() == 0:
        print(f"{summary}\nto train it: model.policy={arguments.out}")


if __name__ == "__main__":
    run(main)
