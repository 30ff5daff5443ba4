"""Converts a Megatron checkpoint, of training or not, to an HF directory; it is never in memory whole.

    tgdpo convert to-hf --megatron DIR --out DIR [--hf-template DIR] [--dtype bf16|fp16|fp32]
        [--max-shard-size 5GB] [--merge [--base MODEL]]

``--megatron`` may also be a training run's output directory: its newest complete checkpoint is taken. Config, tokenizer
and templates come from the checkpoint itself unless ``--hf-template`` names another model. With ``--nproc``, or under
torchrun or srun, the ranks divide the files among them; the result does not depend on their number.

Of a LoRA run the adapter is written, as ``peft`` does; with ``--merge`` a whole model, that is its base with the
adapter added. The base is the run's ``model.policy``, or what ``--base`` names: an HF directory, a Megatron checkpoint
or a model of the Hub. It must be the model that the adapter was trained on, by the sha256 of its weights.
"""

import argparse
import shlex
from pathlib import Path

from checkpoints_convert.arguments import (
    DEFAULT_SHARD_SIZE,
    DTYPE_NAMES,
    check_positive,
    parse_size,
    run,
    timeout_argument,
)
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.resilience.launch import nproc_argument, start_ranks


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="tgdpo convert to-hf", description=__doc__.split("\n")[0])
    parser.add_argument("--megatron", type=Path, required=True, help="Megatron checkpoint or training output directory")
    parser.add_argument("--out", type=Path, required=True, help="HF directory to make")
    parser.add_argument("--hf-template", type=Path, help="model whose config and tokenizer to take (default: its own)")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="of the written weights (default: as stored)")
    parser.add_argument("--max-shard-size", default=DEFAULT_SHARD_SIZE, help="largest weight file, like 500MB or 2GiB")
    parser.add_argument("--merge", action="store_true", help="of a LoRA run: a whole model, base and adapter in one")
    parser.add_argument("--base", help="with --merge: where the base model is (default: the run's model.policy)")
    timeout_argument(parser)
    nproc_argument(parser)
    arguments = parser.parse_args()
    max_shard_bytes = parse_size("--max-shard-size", arguments.max_shard_size)
    check_positive(arguments, "--timeout-minutes")
    if arguments.base is not None and not arguments.merge:
        raise UserError("--base is of --merge: give both, or none for the adapter alone")
    start_ranks(arguments.nproc)
    # Only now: these imports take seconds, a wrong option should not.
    import torch.distributed as dist

    from checkpoints_convert.command_line import DTYPES, dtype_of, find_checkpoint, join_ranks
    from checkpoints_convert.export import export_hf
    from checkpoints_convert.export_adapter import export_adapter
    from checkpoints_convert.merge import find_base
    from megatron_tgdpo.checkpoints.adapter_directory import is_adapter
    from megatron_tgdpo.checkpoints.find_model import find_model
    from megatron_tgdpo.checkpoints.manifest import read_metadata
    from megatron_tgdpo.storage.atomic_directory import refuse_existing

    checkpoint = find_checkpoint(arguments.megatron, adapter=True)
    stored = dtype_of(read_metadata(checkpoint), checkpoint)
    dtype, given = DTYPES.get(arguments.dtype, stored), arguments.hf_template
    lora = is_adapter(checkpoint)
    if arguments.merge and not lora:
        raise UserError(f"--merge: {checkpoint} is a whole model, not an adapter: leave it out")
    if given and lora and not arguments.merge:
        raise UserError(f"--hf-template: {checkpoint} is an adapter, without a config: leave it out, or give --merge")
    base = find_base(checkpoint, arguments.base) if arguments.merge else None
    template = find_model(given, "--hf-template", weights=False) if given else checkpoint
    refuse_existing(arguments.out)
    join_ranks(arguments.timeout_minutes)
    if lora and base is None:
        summary = export_adapter(checkpoint, arguments.out, dtype=dtype)
    else:
        summary = export_hf(
            checkpoint,
            arguments.out,
            template=template,
            stored=stored,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            base=base,
        )
    if dist.get_rank() == 0:
        out = str(summary.out)
        use = f"in Python: AutoModelForCausalLM.from_pretrained({out!r}); as a server: vllm serve {shlex.quote(out)}"
        if lora and base is None:
            use = f"in Python, with peft: AutoPeftModelForCausalLM.from_pretrained({out!r})"
        print(f"{summary}\n{use}")


if __name__ == "__main__":
    run(main)
