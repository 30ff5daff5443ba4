"""``tgdpo train`` whose evaluations say what a test wants, and whose writes fail where it says so.

Arguments: JSON with ``values`` (of ``eval/loss`` on the first rank, in the order of the evaluations from step 1 on, by
step) and ``fail`` (as in worker_saves.py), then those of training. On the other ranks each value is a bit larger.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron_tgdpo.training.performance import Performance
from megatron_tgdpo.training.trainer import Trainer
from tests.distributed.worker_saves import inject
from tgdpo.train import main


def script(values: Mapping[str, float]) -> None:
    real, measured = Trainer.evaluate, Performance.metrics
    done = 0

    def counted(performance: Performance, *arguments: Any) -> dict[str, float]:
        nonlocal done
        done += 1
        return measured(performance, *arguments)

    def evaluate(trainer: Trainer) -> Any:
        found = real(trainer)
        value = float(values[str(trainer.start.step + done)])
        found["eval"] = replace(found["eval"], values={**found["eval"].values, "loss": value + 1e-9 * dist.get_rank()})
        return found

    Performance.metrics = counted  # type: ignore[method-assign]
    Trainer.evaluate = evaluate  # type: ignore[method-assign]


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    inject(given.get("fail", ()))
    script(given["values"])
    main(sys.argv[2:])
