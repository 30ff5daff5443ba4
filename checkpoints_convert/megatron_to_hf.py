"""Converts a Megatron checkpoint, of training or not, to an HF directory.

    python -m checkpoints_convert.megatron_to_hf --megatron DIR --out DIR [--hf-template DIR] [--dtype bf16|fp32]

``--megatron`` may also be a training run's output directory: its newest complete checkpoint is taken. Config, tokenizer
and templates come from the checkpoint itself unless ``--hf-template`` names another HF directory. Alone, or under
torchrun or srun with ``--tensor`` and ``--pipeline``; the result does not depend on the layout but for how the weights
are divided into files.
"""

import argparse
from pathlib import Path

from checkpoints_convert.command_line import (
    DTYPES,
    dtype_of,
    find_checkpoint,
    layout_arguments,
    open_session,
    run,
)
from checkpoints_convert.export import DEFAULT_SHARD_BYTES, export_hf, refuse_existing
from checkpoints_convert.load import load_megatron_weights
from megatron_tgdpo.checkpoint_format import read_metadata
from megatron_tgdpo.hf_config import read_hf_config
from megatron_tgdpo.models import build_language_model


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="checkpoints_convert.megatron_to_hf", description=__doc__.split("\n")[0])
    parser.add_argument("--megatron", type=Path, required=True, help="Megatron checkpoint or training output directory")
    parser.add_argument("--out", type=Path, required=True, help="HF directory to make")
    parser.add_argument("--hf-template", type=Path, help="HF directory for config and tokenizer (default: its own)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the written weights (default: as stored)")
    parser.add_argument("--max-shard-bytes", type=int, default=DEFAULT_SHARD_BYTES, help="largest weight file")
    layout_arguments(parser)
    arguments = parser.parse_args()
    checkpoint = find_checkpoint(arguments.megatron)
    template = arguments.hf_template or checkpoint
    hf_config = read_hf_config(template)
    refuse_existing(arguments.out)
    stored = dtype_of(read_metadata(checkpoint), checkpoint)
    session = open_session(arguments)
    model = build_language_model(hf_config, session.layout, session.pg, dtype=stored, device=session.device)
    load_megatron_weights(model, checkpoint, hf_config)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    export_hf(model, arguments.out, template, hf_config, session.pg, dtype, arguments.max_shard_bytes)
    if session.is_first:
        print(f"{checkpoint} -> {arguments.out}")


if __name__ == "__main__":
    run(main)
