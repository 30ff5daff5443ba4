"""Whether a run is started again: what its exit status asks of the launcher, and whether restarts still help.

    python -m megatron_tgdpo.resilience.requeue CONFIG.yaml section.key=value ... [--job ID] [--limit N]

is what a launcher asks, in one process, before it starts the ranks. It prints the run's output directory. With
``--job`` it counts the launches of that job that begin at the same checkpoint, so that a run that cannot get further
ends instead of being requeued for ever. The requeueing itself is ``launch/train.sbatch``'s.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_tgdpo import signals
from megatron_tgdpo.errors import BadNodeError, StorageError, UserError

FINISHED_STATUS = 3


def exit_status(error: BaseException) -> int:
    """What a rank leaves with, by which ``launch/train.sbatch`` requeues the job or does not.

    Requeued: 75 stopped early and saved, 76 a bad node (left out from then on), 74 storage failed, 70 anything
    unexpected. Not requeued: 1 bad input, which would be met again. 130 is a person's second Ctrl-C.
    """
    if isinstance(error, signals.StoppedEarly):
        return signals.STOPPED_STATUS
    if isinstance(error, KeyboardInterrupt):
        return signals.INTERRUPTED_STATUS
    if isinstance(error, BadNodeError):
        return signals.BAD_NODE_STATUS
    if isinstance(error, StorageError):
        return signals.STORAGE_STATUS
    return 1 if isinstance(error, UserError) else signals.FAILED_STATUS


def count_restart(output_dir: Path, job: str, limit: int) -> int:
    """Notes a launch of a job in ``restarts.json``.

    Returns:
        How many restarts of this job in a row found no new checkpoint, this one included.

    Raises:
        UserError: They are more than ``limit``, or the directory cannot be written.
        StorageError: Storage failed.
    """
    # Only here: every rank asks this module for its exit status.
    from megatron_tgdpo.checkpoints.listing import newest_checkpoint
    from megatron_tgdpo.checkpoints.manifest import read_metadata
    from megatron_tgdpo.storage.atomic_file import write_atomically

    newest = newest_checkpoint(output_dir)
    step = 0 if newest is None else read_metadata(newest).get("step")
    file = output_dir / "restarts.json"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        before = _read(file)
        same = (before.get("job"), before.get("step")) == (job, step)
        count = before["without_progress"] + 1 if same else 0
        write_atomically(file, json.dumps({"job": job, "step": step, "without_progress": count}) + "\n")
    except OSError as error:
        kind = UserError if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)) else StorageError
        raise kind(f"{output_dir}: cannot write the output directory: {error.strerror}") from error
    if count > limit:
        raise UserError(
            f"{output_dir}: job {job} was restarted {limit} times without a new checkpoint (still at step {step}): see "
            f"{output_dir}/logs for the cause, then submit again"
        )
    return count


def _read(file: Path) -> dict[str, Any]:
    """What was noted before; nothing where that was damaged, since a count is not worth a run that does not start."""
    from megatron_tgdpo.storage.json_text import parse_json

    try:
        noted = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        print(f"{file}: not readable, counting restarts anew: {error}", file=sys.stderr)
        return {}
    return noted if isinstance(noted, dict) and isinstance(noted.get("without_progress"), int) else {}


def main() -> int:
    """Command line; see the module.

    Exit status: 0 start the ranks, 3 the run is finished, 74 storage failed and may not the next time, 1 do not start.
    """
    parser = argparse.ArgumentParser(
        prog="python -m megatron_tgdpo.resilience.requeue", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--guide", action="store_true", help="the run is that of the config's guide")
    parser.add_argument("--job", help="count the restarts of this job")
    parser.add_argument("--limit", type=int, default=5, help="restarts without a new checkpoint (default: %(default)s)")
    args = parser.parse_intermixed_args()
    from megatron_tgdpo.config.guide import guide_config
    from megatron_tgdpo.config.loading import load_config
    from megatron_tgdpo.output.directory import is_done
    from megatron_tgdpo.setup.hub_inputs import as_recorded

    try:
        config = load_config(args.config, args.overrides)
        if args.guide:
            config = guide_config(config, args.config)
        output_dir = Path(config.output_dir).absolute()
        print(output_dir)
        if is_done(as_recorded(config)):
            return FINISHED_STATUS
        if args.job:
            count_restart(output_dir, args.job, args.limit)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return signals.STORAGE_STATUS if isinstance(error, StorageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
