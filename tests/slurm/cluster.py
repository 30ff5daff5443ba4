"""Talks to a Slurm: submits training jobs and waits for them, always with a time limit."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.launch import PATIENCE, ROOT, environment

# Two nodes of two tasks, without GPUs: options that a user of a CPU cluster would give.
SMALL = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0")
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}


@dataclass(frozen=True)
class Cluster:
    """A running Slurm.

    Attributes:
        config: Its slurm.conf.
    """

    config: Path

    def run(self, *command: str, cwd: Path = ROOT, check: bool = True, **variables: str) -> str:
        """Runs a client command; returns both its streams."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TGDPO_"))}
        env = {**environment(), **inherited, "SLURM_CONF": str(self.config), "TGDPO_ROOT": str(ROOT)}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            command, cwd=cwd, env={**env, "TGDPO_PYTHON": sys.executable, **variables},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}"
        return done.stdout

    def train(self, work: Path, arguments: list[str], *options: str, **variables: str) -> "Job":
        """Submits ``launch/train.sbatch`` as it is; its output goes to ``work/slurm-ID.out``."""
        script = str(ROOT / "launch" / "train.sbatch")
        answer = self.run("sbatch", "--parsable", *SMALL, *options, script, *arguments, cwd=work, **variables)
        number = answer.strip().splitlines()[-1]
        return Job(self, number, work / f"slurm-{number}.out")


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    cluster: Cluster
    number: str
    output: Path

    def field(self, name: str) -> str:
        """A field of ``scontrol show job``."""
        found = re.search(rf"\b{name}=(\S+)", self.cluster.run("scontrol", "show", "job", self.number))
        assert found
        return found[1]

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def alive(self) -> bool:
        return self.field("JobState") not in _ENDED

    def wait(self, timeout: float = PATIENCE) -> str:
        """Waits until the job has ended for good; returns its state."""
        self.wait_until(lambda: not self.alive(), "ended", timeout)
        return self.field("JobState")

    def wait_until(self, true: Callable[[], bool], what: str, timeout: float = PATIENCE) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < deadline, f"job {self.number} has not {what} in {timeout} s:\n{self.text()}"
            time.sleep(0.5)
