"""Saves a run's checkpoints while training goes on: it waits only until the state is copied to host memory."""

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_float8tensor

from megatron_tgdpo import checkpoint_directory, checkpoint_format
from megatron_tgdpo.checkpoint import checkpoint_path, training_state
from megatron_tgdpo.config import CheckpointConfig
from megatron_tgdpo.setup import policy_chunks
from megatron_tgdpo.train_step import Engine

logger = logging.getLogger(__name__)

# Ranks that have written their part wait for those that have not, and storage may be slow.
_LEAST_TIMEOUT_MINUTES = 120.0


class CheckpointSaver:
    """Writes checkpoints in a thread, one at a time, and removes those that are not to be kept.

    The constructor and all methods are collective over all ranks. The thread's own collectives have a process group of
    their own (gloo), so that they never meet those of training.

    Args:
        engine: What is saved.
        output_dir: The run's directory.
        hf_dir: HF directory or Megatron checkpoint whose config and tokenizer a checkpoint carries.
        settings: How many to keep, and whether to write in the background.
        timeout_minutes: Of collectives.
    """

    def __init__(
        self, engine: Engine, output_dir: Path, hf_dir: Path, settings: CheckpointConfig, timeout_minutes: float
    ) -> None:
        self._engine, self._output_dir, self._hf_dir = engine, output_dir, hf_dir
        self._keep, self._background = settings.keep, settings.background
        timeout = timedelta(minutes=max(timeout_minutes, _LEAST_TIMEOUT_MINUTES))
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[float] | None = None
        self._figures: dict[str, float] = {}

    def save(self, step: int, metadata: Mapping[str, Any]) -> None:
        """Saves policy and optimizer after ``step``; first waits for the save before it, if that still goes on.

        Raises:
            UserError: On every rank: the save before it has failed, or (without ``background``) this one.
        """
        begin = time.monotonic()
        self.finish()
        staged = checkpoint_format.stage(training_state(self._engine, is_loading=False), _live_storages(self._engine))
        self._writing = self._thread.submit(self._write, step, staged, {"step": step, **metadata})
        if not self._background:
            self.finish()
        self._figures["perf/checkpoint_wait_seconds"] = time.monotonic() - begin

    def finish(self) -> None:
        """Waits until nothing is being written.

        Raises:
            UserError: On every rank: the save has failed; earlier checkpoints are still there.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._figures["perf/checkpoint_seconds"] = writing.result()

    def take_figures(self) -> dict[str, float]:
        """For the metrics of the step after a save: how long training waited, and how long the save before took."""
        figures, self._figures = self._figures, {}
        return figures

    def _write(self, step: int, staged: checkpoint_format.StagedState, metadata: Mapping[str, Any]) -> float:
        begin = time.monotonic()
        path = checkpoint_path(self._output_dir, step)
        try:
            checkpoint_format.write(path, staged, self._hf_dir, metadata, self._group)
        except Exception as error:
            # Training hears of it at its next save.
            logger.error("checkpoint of step %d: %s", step, error)
            raise
        if dist.get_rank() == 0 and self._keep:
            for old in checkpoint_directory.complete_checkpoints(self._output_dir)[: -self._keep]:
                checkpoint_directory.remove_checkpoint(old)
        return time.monotonic() - begin


def _live_storages(engine: Engine) -> set[int]:
    """Addresses of everything that the next step writes to."""
    optimizer = engine.optimizer.optimizer
    tensors: list[torch.Tensor] = []
    for chunk in policy_chunks(engine):
        tensors += [*chunk.parameters(), *chunk.buffers()]
    tensors += [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    # An FP8 tensor of Transformer Engine has no storage of its own; what a checkpoint has of it is a new tensor.
    plain = (tensor for tensor in tensors if not is_float8tensor(tensor))
    return {tensor.untyped_storage().data_ptr() for tensor in plain}
