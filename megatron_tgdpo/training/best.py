"""Keeps the best checkpoint: what an evaluation is compared with, and when a run saves because of it."""

import difflib
import json
import logging
import math
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch.distributed as dist

from megatron_tgdpo.checkpoints.best import Best, best_of_record, checkpoint_of, read_best
from megatron_tgdpo.checkpoints.manifest import read_metadata
from megatron_tgdpo.config.resume_compatibility import Inputs
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.output.metrics import eval_group, metric_names
from megatron_tgdpo.training.resume import StartPoint

logger = logging.getLogger(__name__)

# A better model changes them, and what they are compared with.
_COMPARED_MODELS = ("model.reference", "model.guide")


def check_best_metric(config: Config) -> None:
    """Checks before anything is loaded that evaluations will have ``checkpoint.best_metric``.

    Raises:
        UserError: They will not; the message names one that they have.
    """
    metric = config.checkpoint.best_metric
    if metric is None:
        return
    own = metric_names(config.method.without)
    names = [f"{eval_group(group)}/{name}" for group in config.validation_sets for name in own]
    if metric not in names:
        # Of several sets the first one's metric, where the name of the set is missing.
        by_name = {name: name for name in names} | dict(zip(own, names, strict=False))
        near = difflib.get_close_matches(metric, by_name, n=1)
        hint = f"did you mean {by_name[near[0]]}?" if near else f"there are {', '.join(names)}"
        raise UserError(f"checkpoint.best_metric: no evaluation of this run logs {metric!r}; {hint}")


def find_best(config: Config, start: StartPoint) -> Best | None:
    """The best so far of a run that continues, whose checkpoint is there. Collective over all ranks.

    ``best.json`` says, or, where that is behind, the checkpoint that the run goes on from.

    Returns:
        On the first rank; None on others, and where nothing is to be compared with.

    Raises:
        AgreedError: On every rank: the best checkpoint is of another format version.
        AgreedStorageError: On every rank: a file cannot be read.
    """
    return raise_on_all_ranks(lambda: _find_best(config, start) if dist.get_rank() == 0 else None)


def _find_best(config: Config, start: StartPoint) -> Best | None:
    if start.checkpoint is None:
        return None
    output_dir = Path(config.output_dir)
    found = [read_best(output_dir)]
    if start.checkpoint.resolve().is_relative_to(output_dir.resolve()):
        found.append(best_of_record(read_metadata(start.checkpoint).get("best")))
    # A later step is made again. Of two, the later one was the better.
    known = [best for best in found if best is not None and best.step <= start.step]
    for best in sorted(known, key=lambda best: -best.step):
        if checkpoint_of(output_dir, best) is not None:
            return best
    return None


class BestWatch:
    """Says of each evaluation whether it is the best so far.

    Args:
        config: The run.
        inputs: Fingerprints of what it reads.
    """

    def __init__(self, config: Config, inputs: Inputs) -> None:
        self._metric = config.checkpoint.best_metric
        self._mode = best_mode(config)
        compared = {key: inputs.get(key) for key in ("data.validation", *_COMPARED_MODELS)}
        whole = json.dumps([compared, config.loss.method, config.loss.options], sort_keys=True)
        self._basis = sha256(whole.encode()).hexdigest()

    def improvement(self, step: int, values: Mapping[str, float], best: Best | None) -> Best | None:
        """What is the best from now on, if an evaluation is better than ``best``. Collective over all ranks.

        Args:
            step: The evaluation's.
            values: Its metrics; the first rank's decide.
            best: What it is compared with, on the first rank.

        Returns:
            The same on every rank; None if it is no better, or is not a number.
        """
        if self._metric is None:
            return None
        found: list[Best | None] = [None]
        value = values[self._metric]
        if dist.get_rank() == 0 and not math.isfinite(value):
            logger.warning("step %d: %s is %s: it is not compared with the best", step, self._metric, value)
        elif dist.get_rank() == 0:
            new = Best(self._metric, self._mode, value, step, self._basis)
            found = [new if new.is_better(best) else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]


def best_mode(config: Config) -> str:
    """``checkpoint.best_mode``, or what it is by default: ``min`` for a loss, else ``max``."""
    metric = config.checkpoint.best_metric or ""
    return config.checkpoint.best_mode or ("min" if metric.endswith("loss") else "max")
