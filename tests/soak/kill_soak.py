"""Kills a training run at random moments and starts it again, many times: no kill may cost more than an unsaved step.

    python -m tests.soak.kill_soak --kills 30 [--seed 0] [--directory DIR]

Checked after every kill: all processes are gone, every checkpoint is whole, and at most the steps since the last
finished save are lost. At the end: the metrics are those of a run that was never killed, step for step, to the last
bit.
"""

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from megatron_tgdpo.checkpoints.listing import complete_checkpoints
from tests.checkpoints import is_complete
from tests.distributed.common import make_problem, merged
from tests.launch import PATIENCE, ROOT, environment
from tests.processes import run_forked
from tests.series import assert_same_series, logged_steps
from tests.soak import command

KINDS = ("one rank", "during a save", "the launcher", "all ranks", "while starting")
EVERY = 4  # steps between saves
STEPS = 100_000  # far more than are made before the last kill
LEFT_ALONE = 600  # seconds for the rest of a job to end by itself


class Job:
    """The run under torchrun, with two data ranks.

    Args:
        config: Its YAML file.
        run: Its output directory.
    """

    def __init__(self, config: Path, run: Path, *arguments: str) -> None:
        self.run = run
        self._log = run.parent / "soak.log"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        with open(self._log, "ab") as log:
            self._logged_before = log.tell()
            self.launcher = subprocess.Popen(
                [*launcher, "-m", "megatron_tgdpo.train", str(config), f"output_dir={run}", *arguments],
                cwd=ROOT, env=environment(), stdout=log, stderr=log,
            )  # fmt: skip

    def wait_for_step(self, step: int) -> None:
        """Waits until this start, not an earlier one, has logged a step."""
        deadline = time.monotonic() + PATIENCE
        # Before this start has cut what follows the checkpoint, metrics.jsonl has the steps of the one before.
        while not any(int(made) >= step for made in re.findall(r" step (\d+)/", self._output())):
            assert self.launcher.poll() is None, f"the launcher ended by itself:\n{self._output()[-4000:]}"
            assert time.monotonic() < deadline, f"step {step} was not reached"
            time.sleep(0.02)

    def _output(self) -> str:
        with open(self._log, "rb") as log:
            log.seek(self._logged_before)
            return log.read().decode(errors="replace")

    def wait_for_save(self) -> None:
        """Waits until a checkpoint is being written."""
        deadline = time.monotonic() + PATIENCE
        while not any((self.run / "checkpoints").glob("*.tmp")):
            assert time.monotonic() < deadline, "no save began"
            time.sleep(0.001)

    def kill(self, choose: Callable[[list[psutil.Process]], Sequence[psutil.Process]]) -> None:
        """Kills some of launcher (first) and ranks; the rest must end by itself."""
        everyone = [psutil.Process(self.launcher.pid)]
        everyone += everyone[0].children(recursive=True)
        for process in choose(everyone):
            process.kill()
        deadline = time.monotonic() + LEFT_ALONE
        while self.launcher.poll() is None or any(_runs(process) for process in everyone):
            assert time.monotonic() < deadline, f"processes are left {LEFT_ALONE} s after the kill"
            time.sleep(0.1)

    def end(self) -> None:
        """Kills what is left, after a failure of this script."""
        if self.launcher.poll() is None:
            self.kill(lambda everyone: everyone)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_once(job: Job, kind: str, rng: random.Random, saved: int) -> None:
    """Kills a job at a random moment of the given kind; ``saved`` is the step that it starts from."""
    if kind == "while starting":
        time.sleep(rng.uniform(0, 10))
    else:
        job.wait_for_step(saved + rng.randint(1, 3 * EVERY))
        if kind == "during a save":
            job.wait_for_save()
            time.sleep(rng.uniform(0, 0.05))
        else:
            time.sleep(rng.uniform(0, 0.3))
    choices: dict[str, Callable[[list[psutil.Process]], Sequence[psutil.Process]]] = {
        "one rank": lambda everyone: [rng.choice(everyone[1:])],
        "all ranks": lambda everyone: everyone[1:],
        "the launcher": lambda everyone: everyone[:1],
    }
    job.kill(choices.get(kind, lambda everyone: everyone))


def check(run: Path) -> tuple[int, int]:
    """Checks what a kill left; returns the last step that was logged and the last that is saved."""
    logged, complete = logged_steps(run), complete_checkpoints(run)
    saved = int(complete[-1].name[5:]) if complete else 0
    # On a busy machine steps are made while the last save is written; the next one waits for it.
    assert logged - saved < 2 * EVERY, f"step {logged} was made, but only {saved} is saved"
    for path in (run / "checkpoints").glob("step_*"):
        assert is_complete(path) or path.suffix in (".tmp", ".removing"), f"{path} is half a checkpoint"
    return logged, saved


def soak(directory: Path, kills: int, seed: int) -> None:
    """Runs the soak; raises AssertionError where anything but unsaved steps is lost."""
    rng = random.Random(seed)
    config = merged(
        make_problem(directory),
        parallel={"timeout_minutes": 1},
        train={"steps": STEPS},
        optimizer={"warmup_ratio": 0.0},
        checkpoint={"every_steps": EVERY},
    )
    file = directory / "config.yaml"
    file.write_text(json.dumps(config))
    run, whole, lost, torn = directory / "killed", directory / "whole", [], 0
    saved = 0
    for number in range(kills):
        kind = KINDS[number % len(KINDS)]
        job = Job(file, run)
        try:
            kill_once(job, kind, rng, saved)
        finally:
            job.end()
        logged, saved = check(run)
        lost.append(logged - saved)
        torn += any((run / "checkpoints").glob("*.tmp"))
        print(f"kill {number + 1}/{kills}: {kind}, at step {logged}, saved {saved}", flush=True)
    last = f"train.exit_step={saved + EVERY}"
    for output_dir in (run, whole):
        # No launcher is needed where nothing is killed; its ranks import for seconds each.
        run_forked("megatron_tgdpo.train", [str(file), f"output_dir={output_dir}", last], processes=2)
    assert_same_series(run, whole)
    print(f"{kills} kills: {max(lost)} steps lost at most (saves every {EVERY}), {sum(lost)} in all")
    print(f"{torn} kills left a half-written save, none was taken for whole")
    print(f"the series of {saved + EVERY} steps is the uninterrupted one")


if __name__ == "__main__":
    command.run(soak, __doc__, "kills", 30)
