"""Fixtures for tests that need one-rank process groups in the test process itself."""

import logging
import signal
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megatron_tgdpo.distributed.cpu_backend import cpu_backend_enabled

# A shell ignores it in what it starts in the background, and what tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Not for the session: commands that other modules run in this process end with destroying the default group.
@pytest.fixture(scope="module")
def single_rank_group() -> Iterator[dist.ProcessGroup]:
    """The default group of one gloo rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Commands that are run in this process may have silenced it."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """Tests of other modules find torch's own CUDA functions: a rank on the CPU replaces them for its whole process."""
    yield
    assert not cpu_backend_enabled(), "run what enables the CPU backend in a process of its own: tests/processes.py"
