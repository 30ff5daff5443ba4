"""Saves a run's checkpoints while training goes on: it waits only until the state is copied to host memory."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tgdpo.checkpoints import listing as checkpoint_directory
from megatron_tgdpo.checkpoints.best import Best, write_best
from megatron_tgdpo.checkpoints.save import StagedState, stage, write
from megatron_tgdpo.config.schema import CheckpointConfig
from megatron_tgdpo.errors import AgreedStorageError, UserError
from megatron_tgdpo.models.fp8_tensors import is_fp8
from megatron_tgdpo.setup.engine import Engine, policy_chunks
from megatron_tgdpo.training.engine_state import training_state

logger = logging.getLogger(__name__)

# Ranks that have written their part wait for those that have not, and storage may be slow.
_LEAST_TIMEOUT_MINUTES = 120.0
# Without checkpoint.every_steps: so many saves a run, and never longer without one.
_SAVES = 10
_LONGEST_UNSAVED_SECONDS = 30 * 60


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step goes."""
    return output_dir / "checkpoints" / f"step_{step:08d}"


def save_due(step: int, steps: int, every: int | None, waited: float) -> bool:
    """Whether to save after a step.

    Args:
        step: Its number, from 1.
        steps: Of the whole run.
        every: ``checkpoint.every_steps``.
        waited: Seconds since the last save began, or since training did.
    """
    if every is not None:
        return step % every == 0
    return step % math.ceil(steps / _SAVES) == 0 or waited > _LONGEST_UNSAVED_SECONDS


class CheckpointSaver:
    """Writes checkpoints in a thread, one at a time, and removes those that are not to be kept.

    The constructor and :meth:`save` are collective over all ranks. The thread's own collectives have a process group of
    their own (gloo), so that they never meet those of training.

    A save that fails is made up for once, with the state of the moment: storage errors pass. If that fails as well,
    nobody can say what training on is worth.

    Args:
        engine: What is saved.
        output_dir: The run's directory.
        hf_dir: HF directory or Megatron checkpoint whose config and tokenizer a checkpoint carries.
        settings: How many to keep, and whether to write in the background.
        timeout_minutes: Of collectives.
        best: The best checkpoint so far, which is kept whatever its age; the first rank's is used.
        on_saved: Called with a checkpoint when it is complete, on all ranks, in the thread; its collectives are over
            the group that it is given. A UserError of it is logged, and does not make the save one that failed.
    """

    def __init__(
        self,
        engine: Engine,
        output_dir: Path,
        hf_dir: Path,
        settings: CheckpointConfig,
        timeout_minutes: float,
        best: Best | None = None,
        on_saved: Callable[[Path, dist.ProcessGroup], None] | None = None,
    ) -> None:
        self._on_saved = on_saved
        self._engine, self._output_dir, self._hf_dir = engine, output_dir, hf_dir
        self._keep, self._background = settings.keep, settings.background
        self._timeout_minutes = timeout_minutes
        timeout = timedelta(minutes=max(timeout_minutes, _LEAST_TIMEOUT_MINUTES))
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[dict[str, float]] | None = None
        self._figures: dict[str, float] = {}
        # Of what is saved, and with what is being written.
        self._best = self._coming = best
        self._recorded: Best | None = None

    def save(self, step: int, metadata: Mapping[str, Any], *, last: bool = False, best: Best | None = None) -> None:
        """Saves policy and optimizer after ``step``; first waits for the save before it, if that still goes on.

        Args:
            step: Whose state it is.
            metadata: Goes into the checkpoint.
            last: Training does not go on: waits until it is written.
            best: The step's evaluation, if it is the best so far.

        Raises:
            AgreedStorageError: On every rank: two saves in a row have failed; earlier checkpoints are still there.
        """
        begin = time.monotonic()
        failed = self._outcome() is not None
        waits = last or failed or not self._background
        self._start(step, metadata, best)
        while waits and (error := self._outcome()) is not None:
            if failed:
                raise AgreedStorageError(f"{error}; so did the attempt before it")
            failed = True
            self._start(step, metadata, best)
        self._figures["perf/checkpoint_wait_seconds"] = time.monotonic() - begin

    @property
    def best(self) -> Best | None:
        """The best checkpoint on the first rank: the one that is being written, unless that is known to have failed."""
        return self._best if self._writing is None or self.has_failed else self._coming

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that the save which was begun last has failed; others may know it a step later."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def leave(self) -> None:
        """Waits for a save in flight, after an error that ends training, here or everywhere. Raises nothing.

        If other ranks do not take part any more, it is abandoned after ``timeout_minutes``, or when they end.
        """
        if self._writing is not None:
            if not self._writing.done():
                logger.warning("finishing the checkpoint that is being written, then ending")
            wait([self._writing], timeout=60 * self._timeout_minutes)
            if not self._writing.done():
                logger.error("the checkpoint is abandoned: other ranks do not write their parts")

    def take_metrics(self) -> dict[str, float]:
        """For the metrics of the step after a save: how long training waited, and how long the save before took."""
        figures, self._figures = self._figures, {}
        return figures

    def _outcome(self) -> UserError | None:
        """Waits until nothing is being written; why what was begun last is not there. The same on every rank."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                self._figures |= writing.result()
        except UserError as error:
            return error
        return None

    def _start(self, step: int, metadata: Mapping[str, Any], best: Best | None) -> None:
        staged = stage(training_state(self._engine, is_loading=False), live_storages(self._engine))
        self._coming = best or self._best
        best_so_far = None if self._coming is None else self._coming.record()
        self._writing = self._thread.submit(self._write, step, staged, {"step": step, **metadata, "best": best_so_far})

    def _write(self, step: int, staged: StagedState, metadata: Mapping[str, Any]) -> dict[str, float]:
        begin = time.monotonic()
        path = checkpoint_path(self._output_dir, step)
        try:
            write(path, staged, self._hf_dir, metadata, self._group)
        except Exception as error:
            if dist.get_rank() == 0 or not isinstance(error, UserError):
                logger.error("checkpoint of step %d: %s", step, error)
            raise
        self._best = self._coming
        figures = {"perf/checkpoint_seconds": time.monotonic() - begin}
        if dist.get_rank() == 0:
            self._record_best()
        if self._on_saved is not None:
            figures |= self._exported(path, self._on_saved)
        if dist.get_rank() == 0 and self._keep:
            self._remove_old()
        return figures

    def _exported(self, path: Path, export: Callable[[Path, dist.ProcessGroup], None]) -> dict[str, float]:
        begin = time.monotonic()
        try:
            export(path, self._group)
        except UserError as error:
            if dist.get_rank() == 0:
                logger.warning("%s", error)
        return {"perf/export_seconds": time.monotonic() - begin}

    def _record_best(self) -> None:
        if self._best is None or self._best == self._recorded:
            return
        try:
            write_best(self._output_dir, self._best)
        except UserError as error:
            # The checkpoint says it as well.
            logger.warning("%s: the best checkpoint is recorded with the next save", error)
        else:
            self._recorded = self._best

    def _remove_old(self) -> None:
        best = None if self._best is None else checkpoint_path(self._output_dir, self._best.step)
        try:
            for old in checkpoint_directory.complete_checkpoints(self._output_dir)[: -self._keep]:
                if old != best:
                    checkpoint_directory.remove_checkpoint(old)
        except (OSError, UserError) as error:
            # On this rank alone, and the new checkpoint is whole: what is left is removed after the next save or at the
            # next start.
            logger.warning("an old checkpoint cannot be removed: %s", error)


def live_storages(engine: Engine) -> set[int]:
    """Addresses of everything that the next step writes to."""
    tensors: list[torch.Tensor] = []
    for chunk in policy_chunks(engine):
        tensors += [*chunk.parameters(), *chunk.buffers()]
    tensors += [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    for optimizer in engine.optimizer.chained_optimizers:
        for state in optimizer.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    # An FP8 tensor of Transformer Engine has no storage of its own; what a checkpoint has of it is a new tensor.
    plain = (tensor for tensor in tensors if not is_fp8(tensor))
    return {tensor.untyped_storage().data_ptr() for tensor in plain}
