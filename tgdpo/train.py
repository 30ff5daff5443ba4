"""``tgdpo train CONFIG.yaml [--nproc N] section.key=value ...``, a process per rank; or under torchrun or srun.

USR1, TERM or Ctrl-C to any rank ends the run at the next step boundary, with a checkpoint; a second Ctrl-C at once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tgdpo import train

if TYPE_CHECKING:
    import torch.distributed as dist

    from megatron_tgdpo.config.schema import ExportKind


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line and exit status: :func:`megatron_tgdpo.train.main`; what this adds is ``export.hf``."""
    train.main(arguments, export)


def export(checkpoint: Path, out: Path, group: "dist.ProcessGroup | None", *, verify: bool, kind: "ExportKind") -> None:
    """Writes a checkpoint of the run as an HF or a ``peft`` directory; see ``training/export.py: Exporter``."""
    # Only now: a wrong option should not take the seconds of these imports.
    from checkpoints_convert.arguments import DEFAULT_SHARD_SIZE, parse_size
    from checkpoints_convert.command_line import dtype_of
    from checkpoints_convert.export import export_hf
    from checkpoints_convert.export_adapter import export_adapter
    from checkpoints_convert.merge import find_base
    from megatron_tgdpo.checkpoints.manifest import read_metadata
    from megatron_tgdpo.distributed.ranks import raise_on_all_ranks

    stored = raise_on_all_ranks(lambda: dtype_of(read_metadata(checkpoint), checkpoint), group)
    base = None
    if kind == "adapter":
        export_adapter(checkpoint, out, dtype=stored, verify=verify, group=group)
        return
    if kind == "merged":
        base = raise_on_all_ranks(lambda: find_base(checkpoint, None), group)
    size = parse_size("the shard size", DEFAULT_SHARD_SIZE)
    export_hf(
        checkpoint,
        out,
        template=checkpoint,
        stored=stored,
        dtype=stored,
        max_shard_bytes=size,
        base=base,
        verify=verify,
        group=group,
        quiet=True,
    )


if __name__ == "__main__":
    main()
