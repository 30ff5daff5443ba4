"""Asks a training run to stop at random moments (Ctrl-C, TERM, USR1), many times, and starts it again each time.

    python -m tests.soak.signal_soak [--signals 20] [--seed 0] [--directory DIR]

Signals go to one rank of two, to both, or to torchrun; while the run starts, between steps and during saves; some are
followed by others, and by a second Ctrl-C, which ends the run at once. Checked every time: the run ends by itself, with
the status of a stop, and what it logged is saved; after a second Ctrl-C, or a signal before anybody listens, at most
the steps since the last finished save are lost; every checkpoint is whole. In the end the metrics are those of a run
that nobody stopped, to the last bit.
"""

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from megatron_tgdpo.checkpoints.listing import complete_checkpoints
from megatron_tgdpo.signals import FAILED_STATUS, INTERRUPTED_STATUS, STOPPED_STATUS
from tests.checkpoints import is_complete
from tests.distributed.common import make_problem, merged
from tests.forked import Forked
from tests.launch import PATIENCE
from tests.processes import run_forked, started_ranks
from tests.series import assert_same_series, logged_steps, wait_for_step
from tests.soak import command
from tests.soak.kill_soak import Job

EVERY = 4  # steps between saves
STEPS = 100_000  # far more than are made before the last signal
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
MOMENTS = ("between steps", "during a save", "while starting")
# "again": another signal that changes nothing. "interrupted again": a second Ctrl-C.
TARGETS = ("one rank", "all ranks", "again", "interrupted again", "torchrun")
STARTING = 6.0  # seconds that a start takes, about


class Round:
    """One start of the run and what befalls it.

    Args:
        rng: Chooses.
        number: Of the round, from 0: targets take turns.
    """

    def __init__(self, rng: random.Random, number: int) -> None:
        self._rng = rng
        self.target = TARGETS[number % len(TARGETS)]
        self.moment = rng.choice(MOMENTS[:2] if self.target == "torchrun" else MOMENTS)
        # torchrun itself dies of USR1.
        self.signal = rng.choice(SIGNALS[:2] if self.target == "torchrun" else SIGNALS)

    def __str__(self) -> str:
        return f"{self.signal.name} to {self.target}, {self.moment}"

    def play(self, file: Path, run: Path) -> list[int]:
        """Starts the run, sends what is to be sent and waits for the end.

        Returns:
            The ranks' exit statuses; empty if torchrun has them.
        """
        known = logged_steps(run)
        if self.target == "torchrun":
            job = Job(file, run)
            try:
                self._wait(run, known, lambda: job.launcher.poll() is None)
                job.launcher.send_signal(self.signal)
                assert job.launcher.wait(timeout=PATIENCE) != 0
            finally:
                job.end()
            return []
        with started_ranks([str(file), f"output_dir={run}"], 2, run.parent / "logs") as ranks:
            self._wait(run, known, lambda: all(rank.poll() is None for rank in ranks))
            self._send(ranks)
            return _ended(ranks)

    def _wait(self, run: Path, known: int, alive: Callable[[], bool]) -> None:
        if self.moment == "while starting":
            time.sleep(self._rng.uniform(0, STARTING))
            return
        wait_for_step(run, known + self._rng.randint(1, EVERY), alive)
        if self.moment == "during a save":
            deadline = time.monotonic() + PATIENCE
            while not any((run / "checkpoints").glob("*.tmp")):
                assert alive(), "the job ended by itself"
                assert time.monotonic() < deadline, "no save began"
                time.sleep(0.001)
        time.sleep(self._rng.uniform(0, 0.3))

    def _send(self, ranks: list[Forked]) -> None:
        for rank in [self._rng.choice(ranks)] if self.target == "one rank" else ranks:
            rank.send_signal(self.signal)
        if self.target in ("again", "interrupted again"):
            time.sleep(self._rng.uniform(0, 0.3))
            for rank in ranks:
                rank.send_signal(signal.SIGINT if self.target == "interrupted again" else signal.SIGTERM)

    def check(self, run: Path, before: int, statuses: list[int]) -> tuple[int, int]:
        """Checks what a round left; returns the last step that was logged and the last that is saved."""
        logged, complete = logged_steps(run), complete_checkpoints(run)
        saved = int(complete[-1].name[5:]) if complete else 0
        for path in (run / "checkpoints").glob("step_*"):
            assert is_complete(path) or path.suffix in (".tmp", ".removing"), f"{path} is half a checkpoint"
        assert saved >= before, f"{self}: step {before} was saved, and now {saved} is the last"
        # On a busy machine steps are made while the last save is written; the next one waits for it.
        assert logged - saved < 2 * EVERY, f"{self}: step {logged} was made, but only {saved} is saved"
        if self.moment == "while starting":
            return logged, saved
        if self.target == "interrupted again":
            assert set(statuses) <= {STOPPED_STATUS, INTERRUPTED_STATUS, FAILED_STATUS}, statuses
            return logged, saved
        assert set(statuses) <= {STOPPED_STATUS}, f"{self}: {statuses}"
        assert logged == saved, f"{self}: step {logged} was made, but only {saved} is saved"
        return logged, saved


def _ended(ranks: list[Forked]) -> list[int]:
    """Waits for all ranks; when one ends other than by stopping, the rest are told to, as torchrun does."""
    deadline = time.monotonic() + PATIENCE
    told = False
    while (statuses := [rank.poll() for rank in ranks]).count(None):
        assert time.monotonic() < deadline, f"ranks are left: {statuses}"
        if not told and not {None, STOPPED_STATUS}.issuperset(statuses):
            told = True
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    return [rank.wait() for rank in ranks]


def soak(directory: Path, signals: int, seed: int) -> None:
    """Runs the soak; raises AssertionError where anything but unsaved steps is lost."""
    rng = random.Random(seed)
    config = merged(
        make_problem(directory),
        parallel={"timeout_minutes": 1},
        train={"steps": STEPS},
        optimizer={"warmup_ratio": 0.0},
        checkpoint={"every_steps": EVERY},
    )
    file, run, whole = directory / "config.yaml", directory / "run", directory / "whole"
    file.write_text(json.dumps(config))
    saved, lost, ends = 0, [], Counter[str]()
    for number in range(signals):
        played = Round(rng, number)
        statuses = played.play(file, run)
        logged, saved = played.check(run, saved, statuses)
        lost.append(logged - saved)
        ends[played.signal.name] += 1
        shown = f"statuses {statuses}" if statuses else "stopped"
        print(f"{number + 1}/{signals}: {played}: {shown} at step {logged}, saved {saved}", flush=True)
    last = f"train.exit_step={saved + EVERY}"
    for output_dir in (run, whole):
        run_forked("megatron_tgdpo.train", [str(file), f"output_dir={output_dir}", last], processes=2)
    assert_same_series(run, whole)
    print(f"{signals} signals ({dict(ends)}): {max(lost)} steps lost at most (saves every {EVERY}), {sum(lost)} in all")
    print(f"the series of {saved + EVERY} steps is the undisturbed one")


if __name__ == "__main__":
    command.run(soak, __doc__, "signals", 20)
