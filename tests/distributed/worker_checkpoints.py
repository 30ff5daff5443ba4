"""Trains while checkpoints are written, and from damaged ones: ``worker_checkpoints CONFIG.json``, on two ranks.

Leaves runs in the config's ``output_dir``-foreground, -background and -damaged, and each rank's errors in
``output_dir``-unreadable and ``output_dir``-error.
"""

import errno
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_tgdpo.checkpoints import manifest
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.distributed.ranks import RankEnvironment, connect_store, read_rank_environment
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.files import FileDigest, file_digest
from megatron_tgdpo.training import checkpoint_saver, trainer
from megatron_tgdpo.training.run import run
from tests.checkpoints import flip
from tests.distributed.common import merged

ENOUGH = 120


class Runner:
    def __init__(self, ranks: RankEnvironment, store: dist.Store) -> None:
        self._ranks, self._store, self._runs = ranks, store, 0

    def __call__(self, config: dict[str, Any]) -> None:
        self._runs += 1
        run(config_from_dict(config), self._ranks, dist.PrefixStore(f"run{self._runs}", self._store))


def train_past_a_write(runner: Runner, config: dict[str, Any]) -> None:
    """The checkpoint of step 3 is not written before step 5 is made."""
    write, train_step = checkpoint_saver.write, trainer.train_step
    steps = iter(range(1, 100))
    fifth = threading.Event()

    def later(path: Path, *arguments: Any) -> None:
        assert fifth.wait(ENOUGH), "training waited for the checkpoint"
        write(path, *arguments)

    def counted(*arguments: Any) -> Any:
        result = train_step(*arguments)
        if next(steps) == 5:
            fifth.set()
        return result

    with mock.patch.object(checkpoint_saver, "write", later), mock.patch.object(trainer, "train_step", counted):
        runner(config)


def flip_a_bit(checkpoint: Path) -> None:
    if dist.get_rank() == 0:
        file = checkpoint / "__1_0.distcp"
        flip(file, file.stat().st_size // 2)
    dist.barrier()


def unreadable(file: Path) -> FileDigest:
    """The second rank's storage fails."""
    if dist.get_rank() == 1:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return file_digest(file)


def write_error(runner: Runner, config: dict[str, Any], file: str) -> None:
    """Writes how a run ends: the error's type and message."""
    text = "no error"
    try:
        runner(config)
    except UserError as error:
        text = f"{type(error).__name__}: {error}"
    Path(file).write_text(text)


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    base = config["output_dir"]
    ranks = read_rank_environment()
    runner = Runner(ranks, connect_store(ranks))
    runner(merged(config, checkpoint={"background": False}, output_dir=f"{base}-foreground"))
    train_past_a_write(runner, merged(config, output_dir=f"{base}-background"))
    damaged = merged(config, checkpoint={"every_steps": 2}, output_dir=f"{base}-damaged")
    runner(merged(damaged, train={"exit_step": 4}))
    checkpoints = Path(f"{base}-damaged") / "checkpoints"
    flip_a_bit(checkpoints / "step_00000004")
    runner(damaged)
    with mock.patch.object(manifest, "file_digest", unreadable):
        write_error(runner, damaged, f"{base}-unreadable-{ranks.rank}")
    for path in checkpoints.glob("step_*[0-9]"):
        flip_a_bit(path)
    for attempt in range(2):
        write_error(runner, damaged, f"{base}-error-{attempt}-{ranks.rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
