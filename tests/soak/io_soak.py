"""Trains on storage that fails at random moments, saving and loading; nothing may be lost beyond the last save.

    python -m tests.soak.io_soak [--faults 20] [--seed 0] [--directory DIR]

Each round is a start of the run on two data ranks that goes on for some steps. One call, some in a row or all from a
moment on fail on one rank, with EIO, ESTALE, EMFILE or ENOSPC. Whatever happens, the start ends by itself, as planned
or with the status of failing storage; no checkpoint is taken for damaged; and the run gives in the end the series of
one that nothing disturbed. Rounds in which no fault struck are not counted.
"""

import errno
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_tgdpo.checkpoints.listing import complete_checkpoints, saved_checkpoints
from megatron_tgdpo.signals import STORAGE_STATUS
from tests.distributed.common import make_problem, merged
from tests.processes import run_forked
from tests.series import assert_same_series, logged_steps
from tests.soak import command

EVERY = 3  # steps between saves
STEPS_PER_ROUND = 7
# Calls under checkpoints/ that a load or a save makes, or some fewer: where the first fault may be.
CALLS = {"load": 40, "save": 90}
ERRORS = {
    "load": (errno.EIO, errno.ESTALE, errno.EMFILE),
    "save": (errno.EIO, errno.ESTALE, errno.ENOSPC),
}
FOR_EVER = 10**6


def draw_faults(rng: random.Random, log: Path) -> dict[str, Any]:
    """Where, when and how long storage fails in a round; see ``worker_io.Faults``."""
    phase = rng.choice(("load", "save"))
    return {
        "rank": rng.randrange(2),
        "phase": phase,
        "first": rng.randrange(CALLS[phase]),
        "count": rng.choice((1, 1, 3, FOR_EVER)),
        "errno": rng.choice(ERRORS[phase]),
        "log": str(log),
    }


def check(run: Path, before: int, status: int, output: str) -> tuple[int, int]:
    """Checks what a round left; returns the last step that was logged and the last that is saved."""
    assert status in (0, STORAGE_STATUS), f"status {status}\n{output[-4000:]}"
    assert "Traceback" not in output, output[-4000:]
    if status:
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert "checkpoints" in line
    complete = complete_checkpoints(run)
    assert complete == saved_checkpoints(run), "there is half a checkpoint"
    assert not list((run / "checkpoints").glob("*.damaged*")), "a checkpoint was taken for damaged"
    logged, saved = logged_steps(run), int(complete[-1].name[5:]) if complete else 0
    assert saved >= before, f"step {before} was saved, and now {saved} is the last"
    # A failed save is tried again after the step in which that is noticed: on a busy machine when the next is due.
    assert logged - saved <= 2 * EVERY + 1, f"step {logged} was made, but only {saved} is saved"
    return logged, saved


def soak(directory: Path, faults: int, seed: int) -> None:
    """Runs the soak; raises AssertionError where anything but unsaved steps is lost."""
    rng = random.Random(seed)
    steps = STEPS_PER_ROUND * 3 * (faults + 1)
    config = merged(make_problem(directory), train={"steps": steps}, checkpoint={"every_steps": EVERY})
    file, run, log = directory / "config.yaml", directory / "run", directory / "faults.log"
    file.write_text(json.dumps(config))
    log.touch()
    reached, struck, saved, lost, kinds = 0, 0, 0, [], Counter[str]()
    while struck < faults:
        planned = directory / "faults.json"
        planned.write_text(json.dumps(draw_faults(rng, log)))
        known = len(log.read_text().splitlines())
        reached = min(max(reached, saved + STEPS_PER_ROUND), steps - 1)
        arguments = [str(planned), str(file), f"output_dir={run}", f"train.exit_step={reached}"]
        done = run_forked("tests.soak.worker_io", arguments, processes=2, check=False)
        (directory / "soak.log").open("a").write(done.stdout + done.stderr)
        new = log.read_text().splitlines()[known:]
        logged, saved = check(run, saved, done.returncode, done.stdout + done.stderr)
        lost.append(logged - saved)
        if new:
            struck += 1
            outcome = "goes on" if done.returncode == 0 else "ends"
            kinds[f"{new[0].split(', ')[1]}, {outcome}"] += 1
            print(f"{struck}/{faults}: {new[0]} ({len(new)} times): {outcome} at {logged}, saved {saved}", flush=True)
    whole = directory / "whole"
    last = f"train.exit_step={saved + EVERY}"
    for output_dir in (run, whole):
        run_forked("megatron_tgdpo.train", [str(file), f"output_dir={output_dir}", last], processes=2)
    assert_same_series(run, whole)
    print(f"{faults} rounds with faults ({dict(kinds)}): {max(lost)} steps lost at most (saves every {EVERY})")
    print(f"no checkpoint was taken for damaged; the series of {saved + EVERY} steps is the undisturbed one")


if __name__ == "__main__":
    command.run(soak, __doc__, "faults", 20)
