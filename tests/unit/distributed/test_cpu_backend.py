"""The CPU backend's first parallel call of a vector function is as exact as the second."""

import subprocess
import sys

import torch

from megatron_tgdpo.distributed.cpu_backend import _not_onto_itself
from tests.launch import PATIENCE, ROOT, environment

PROCESSES = 100
# Each child is a process whose vector functions have not been used, and whose threads are awake when they are. Without
# the backend's own first call some 4 % of them get half of the cosines with half of the digits.
FORK_AND_COMPARE = f"""
import os, torch
import megatron.core.tensor_parallel.random
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend

torch.set_num_threads(1)
angles = torch.arange(1728.0)[:, None] * torch.arange(1, 65) / 64
hidden, weight = torch.randn(1728, 384), torch.randn(384, 640)
statuses = []
for _ in range({PROCESSES}):
    if not (child := os.fork()):
        enable_cpu_backend()
        torch.set_num_threads(2)
        torch.nn.functional.rms_norm(hidden, (384,)) @ weight
        os._exit(not torch.equal(torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).cos()))
    statuses.append(os.waitpid(child, 0)[1])
print(sum(status != 0 for status in statuses), "of", len(statuses))
"""


def test_the_first_cosines_are_exact() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK_AND_COMPARE], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"0 of {PROCESSES}\n"), done.stderr[-2000:]


def test_a_rank_sends_nothing_to_itself() -> None:
    """gloo would copy all gradients, or all weights, for that."""
    called = []
    reduce = _not_onto_itself(lambda output, sent, **options: called.append((output.data_ptr(), options)))
    buffer = torch.zeros(4)
    reduce(buffer, buffer.view(-1), group=None, async_op=True)
    assert called == []
    # One rank of two has a half of what is reduced; what is elsewhere has to be moved.
    reduce(buffer[:2], buffer, async_op=False)
    reduce(torch.zeros(4), buffer)
    assert [options for _, options in called] == [{"async_op": False}, {}]
