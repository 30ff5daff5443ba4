"""Converts an HF directory to a Megatron checkpoint.

    python -m checkpoints_convert.hf_to_megatron --hf DIR --out DIR [--dtype bf16|fp32]

Alone, or under torchrun or srun with ``--tensor`` and ``--pipeline``: each rank then reads and holds only its part. The
result does not depend on the layout. Without ``--dtype``, fp32 stays fp32 and everything else becomes bf16.
"""

import argparse
from pathlib import Path

import torch
from transformers import PretrainedConfig

from checkpoints_convert.command_line import DTYPES, Session, layout_arguments, open_session, run
from checkpoints_convert.export import refuse_existing
from checkpoints_convert.hf_reader import HfCheckpoint
from checkpoints_convert.load import load_hf_weights
from checkpoints_convert.mapping import parameter_count
from megatron_tgdpo import checkpoint_format
from megatron_tgdpo.hf_config import read_hf_config
from megatron_tgdpo.models import build_language_model
from megatron_tgdpo.ranks import agree


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="checkpoints_convert.hf_to_megatron", description=__doc__.split("\n")[0])
    parser.add_argument("--hf", type=Path, required=True, help="HF directory with safetensors")
    parser.add_argument("--out", type=Path, required=True, help="Megatron checkpoint directory to make")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the stored weights")
    layout_arguments(parser)
    arguments = parser.parse_args()
    hf_config = read_hf_config(arguments.hf)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else stored_dtype(arguments.hf)
    refuse_existing(arguments.out)
    session = open_session(arguments)
    convert(arguments.hf, arguments.out, hf_config, dtype, session)
    if session.is_first:
        print(f"{arguments.out}: {parameter_count(hf_config):,} parameters in {_name(dtype)}")


def convert(hf: Path, out: Path, hf_config: PretrainedConfig, dtype: torch.dtype, session: Session) -> None:
    """Loads the HF weights into this rank's slice and saves the Megatron checkpoint; collective over all ranks."""
    model = build_language_model(hf_config, session.layout, session.pg, dtype=dtype, device=session.device)
    agree(lambda: load_hf_weights(model, hf, hf_config, session.pg))
    metadata = {"dtype": _name(dtype), "step": None, "parameters": parameter_count(hf_config)}
    checkpoint_format.save(out, {"model": model.sharded_state_dict()}, hf, metadata)


def stored_dtype(hf: Path) -> torch.dtype:
    """fp32 if any weight is stored so, else bf16."""
    return torch.float32 if any(t.dtype == "F32" for t in HfCheckpoint(hf).tensors.values()) else torch.bfloat16


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


if __name__ == "__main__":
    run(main)
