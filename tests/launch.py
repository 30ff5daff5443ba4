"""Starts programs as users do, and says why when one fails; ``processes.py`` starts them faster."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
# Seconds after which a test gives up what never comes. It says nothing of how long a thing takes: on a machine that is
# busy with something else, that may be twenty times as long as usual.
PATIENCE = 900.0
# The Python of an environment with other versions of megatron-core and torch, that results are compared with; or "".
OTHER_PYTHON = os.environ.get("TGDPO_OTHER_PYTHON", "")


def environment() -> dict[str, str]:
    """One thread a process, and this checkout importable from anywhere."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def run_module(
    module: str,
    arguments: Sequence[str],
    *,
    processes: int = 1,
    timeout: float = PATIENCE,
    check: bool = True,
    python: str = sys.executable,
) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m module`` alone or under torchrun; fails the test with the output's end if it must succeed."""
    launcher = [python]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*launcher, "-m", module, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return checked(done, processes) if check else done


def checked(done: subprocess.CompletedProcess[str], processes: int) -> subprocess.CompletedProcess[str]:
    """The same, if it succeeded.

    Raises:
        AssertionError: It did not.
    """
    if done.returncode:
        output = f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        raise AssertionError(f"{done.args} on {processes} processes failed:\n{output}")
    return done
