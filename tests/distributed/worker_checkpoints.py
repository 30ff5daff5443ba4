"""Trains while checkpoints are written, and from damaged ones: ``worker_checkpoints CONFIG.json``, on two ranks.

Leaves runs in the config's ``output_dir``-foreground, -background and -damaged, and the final error in
``output_dir``-error.
"""

import json
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_tgdpo import checkpoint_format, trainer
from megatron_tgdpo.config import config_from_dict
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.ranks import RankEnvironment, connect_store, read_rank_environment
from megatron_tgdpo.run import run
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
    write, train_step = checkpoint_format.write, trainer.train_step
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

    with mock.patch.object(checkpoint_format, "write", later), mock.patch.object(trainer, "train_step", counted):
        runner(config)


def flip_a_bit(checkpoint: Path) -> None:
    if dist.get_rank() == 0:
        file = checkpoint / "__1_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    dist.barrier()


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
    message = "no error"
    for step in (2, 4, 6):
        flip_a_bit(checkpoints / f"step_{step:08d}")
    try:
        runner(damaged)
    except UserError as error:
        message = str(error)
    Path(f"{base}-error-{ranks.rank}").write_text(message)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
