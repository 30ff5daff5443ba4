"""``megatron_tgdpo.train`` with faults.

Arguments: JSON with ``fail`` (which writes fail on the last rank, from 0), ``slow`` (seconds that each takes longer)
and ``broken`` (the step at which the last rank raises an exception), then those of training.
"""

import errno
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megatron_tgdpo.checkpoints import save
from megatron_tgdpo.train import main
from megatron_tgdpo.training.step import StepResult
from megatron_tgdpo.training.trainer import Trainer


def is_last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def inject(fail: Sequence[int] = (), slow: float = 0, broken: int = 0) -> None:
    numbers, write = itertools.count(), save._write_sharded

    def faulty(*arguments: Any) -> Any:
        number = next(numbers)
        time.sleep(slow)
        if number not in fail:
            return write(*arguments)
        if is_last():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return {}

    guard = Trainer._guard

    def broken_guard(trainer: Trainer, step: int, result: StepResult) -> None:
        if step == broken and is_last():
            raise ZeroDivisionError
        guard(trainer, step, result)

    save._write_sharded = faulty
    Trainer._guard = broken_guard  # type: ignore[method-assign]


if __name__ == "__main__":
    inject(**json.loads(sys.argv[1]))
    main(sys.argv[2:])
