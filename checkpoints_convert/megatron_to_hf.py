"""Converts a Megatron checkpoint, of training or not, to an HF directory; it is never in memory whole.

    tgdpo convert to-hf --megatron DIR --out DIR [--hf-template DIR] [--dtype bf16|fp16|fp32]
        [--max-shard-size 5GB]

``--megatron`` may also be a training run's output directory: its newest complete checkpoint is taken. Config, tokenizer
and templates come from the checkpoint itself unless ``--hf-template`` names another model. With ``--nproc``, or under
torchrun or srun, the ranks divide the files among them; the result does not depend on their number.
"""

import argparse
from pathlib import Path

from checkpoints_convert.arguments import (
    DEFAULT_SHARD_SIZE,
    DTYPE_NAMES,
    check_positive,
    parse_size,
    run,
    timeout_argument,
)
from megatron_tgdpo.resilience.launch import nproc_argument, start_ranks


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="tgdpo convert to-hf", description=__doc__.split("\n")[0])
    parser.add_argument("--megatron", type=Path, required=True, help="Megatron checkpoint or training output directory")
    parser.add_argument("--out", type=Path, required=True, help="HF directory to make")
    parser.add_argument("--hf-template", type=Path, help="model whose config and tokenizer to take (default: its own)")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of the written weights (default: as stored)")
    parser.add_argument("--max-shard-size", default=DEFAULT_SHARD_SIZE, help="largest weight file, like 500MB or 2GiB")
    timeout_argument(parser)
    nproc_argument(parser)
    arguments = parser.parse_args()
    max_shard_bytes = parse_size("--max-shard-size", arguments.max_shard_size)
    check_positive(arguments, "--timeout-minutes")
    start_ranks(arguments.nproc)
    # Only now: these imports take seconds, a wrong option should not.
    import torch.distributed as dist

    from checkpoints_convert.command_line import DTYPES, dtype_of, find_checkpoint, join_ranks
    from checkpoints_convert.export import export_hf
    from megatron_tgdpo.checkpoints.find_model import find_model
    from megatron_tgdpo.checkpoints.manifest import read_metadata
    from megatron_tgdpo.storage.atomic_directory import refuse_existing

    checkpoint = find_checkpoint(arguments.megatron)
    stored = dtype_of(read_metadata(checkpoint), checkpoint)
    given = arguments.hf_template
    template = find_model(given, "--hf-template", weights=False) if given else checkpoint
    refuse_existing(arguments.out)
    join_ranks(arguments.timeout_minutes)
    summary = export_hf(
        checkpoint,
        arguments.out,
        template=template,
        stored=stored,
        dtype=DTYPES.get(arguments.dtype, stored),
        max_shard_bytes=max_shard_bytes,
    )
    if dist.get_rank() == 0:
        print(summary)


if __name__ == "__main__":
    run(main)
