"""Kills ``tgdpo pipeline`` at random moments of each stage and starts it again: no stage is lost, none taken for whole.

    python -m tests.soak.pipeline_soak --kills 2 [--seed 0] [--directory DIR]

``--kills`` are of each stage: the pipeline alone, then the stage alone, then both, and again. Checked after each: all
processes end, and the stages that were complete are skipped. At the end: metrics of guide and policy, the exported
weights and the evaluation are those of a pipeline that was never killed, to the last bit.
"""

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.distributed.common import make_problem, merged
from tests.launch import PATIENCE, ROOT, environment
from tests.series import assert_same_series
from tests.soak import command

STAGES = ("guide", "guidance", "train", "export", "evaluate")
KINDS = ("the pipeline", "the stage", "both")
LATEST = 8.0  # seconds of a stage after which it is killed at the latest; the next may have begun by then


class Run:
    """A pipeline that runs.

    Args:
        config: Its YAML file.
        output_dir: Where it writes.
    """

    def __init__(self, config: Path, output_dir: Path) -> None:
        self.log = output_dir.with_suffix(".log")
        words = ["pipeline", str(config), f"output_dir={output_dir}", f"guidance.cache={output_dir}-cache"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tgdpo", *words, "--prompts", "2", "--max-new-tokens", "4"],
                cwd=ROOT, env=environment(), stdout=log, stderr=log,
            )  # fmt: skip

    def said(self) -> str:
        """What it wrote."""
        return self.log.read_text(errors="replace")

    def wait_for(self, stage: str) -> bool:
        """Waits until a stage has begun; whether it has, and was not skipped."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(rf"^=== ./. {stage}\n", self.said(), re.MULTILINE):
            if f" {stage}: complete, skipped" in self.said() or self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"{stage} did not begin:\n{self.said()[-4000:]}"
            time.sleep(0.05)
        return True

    def complete(self) -> set[str]:
        """Stages that were complete when it had come as far as it did."""
        begun = re.findall(r"^=== \d/\d (\w+)", self.said(), re.MULTILINE)
        return set(STAGES[: STAGES.index(begun[-1])]) if begun else set()

    def kill(self, kind: str) -> None:
        """Kills the pipeline, its stage, or both, and waits until nothing of it runs."""
        everyone = [psutil.Process(self.process.pid)]
        everyone += everyone[0].children(recursive=True)
        for process in {"the pipeline": everyone[:1], "the stage": everyone[1:]}.get(kind, everyone):
            process.kill()
        self.process.wait(timeout=PATIENCE)
        _, alive = psutil.wait_procs(everyone[1:], timeout=PATIENCE)
        assert not alive, f"{alive} outlived {kind}"

    def end(self) -> None:
        """Kills what is left, after a failure of this script."""
        if self.process.poll() is None:
            self.kill("both")


def kill_in(
    stage: str, kind: str, complete: set[str], config: Path, output_dir: Path, rng: random.Random
) -> str | None:
    """Kills a pipeline in a stage; says when, or None where the stage was complete before; adds to ``complete``."""
    run = Run(config, output_dir)
    try:
        if not run.wait_for(stage):
            assert f" {stage}: complete, skipped" in run.said(), run.said()[-4000:]
            return None
        for before in complete:
            assert f" {before}: complete, skipped" in run.said(), f"{before} was not skipped before {stage}"
        seconds = rng.uniform(0, LATEST)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and run.process.poll() is None:
            time.sleep(0.05)
        assert run.process.poll() in (None, 0), run.said()[-4000:]
        if run.process.poll() is None:
            run.kill(kind)
        complete |= run.complete()
        return f"{kind} killed {seconds:.1f} s after {stage} had begun, in {re.findall('=== ./. (.*)', run.said())[-1]}"
    finally:
        run.end()


def finish(config: Path, output_dir: Path) -> str:
    """Runs a pipeline to its end; what it wrote."""
    run = Run(config, output_dir)
    try:
        assert run.process.wait(timeout=PATIENCE) == 0, run.said()[-4000:]
    finally:
        run.end()
    return run.said()


def evaluation(output_dir: Path) -> dict[str, Any]:
    """The table, without the places of the models."""
    content: dict[str, Any] = json.loads((output_dir / "evaluation.json").read_text())
    for model in content["models"].values():
        del model["directory"]
    return content


def soak(directory: Path, kills: int, seed: int) -> None:
    """Runs the soak; raises AssertionError where a stage is lost, or taken for whole."""
    rng = random.Random(seed)
    values = merged(
        make_problem(directory),
        model={"guide": None},
        guide={"method": "dpo", "beta": 0.01, "lr": 2e-3},
        guidance={"mode": "cached", "cache": "set by override"},
        train={"steps": 8},
        preflight={"enabled": False},
        checkpoint={"every_steps": 2},
    )
    values["data"]["validation"] = values["data"]["train"]
    config = directory / "config.yaml"
    config.write_text(json.dumps(values))
    killed, whole = directory / "killed", directory / "whole"
    finish(config, whole)
    made, number, complete = 0, 0, set[str]()
    for stage in STAGES:
        for _ in range(kills):
            kind = KINDS[number % len(KINDS)]
            how = kill_in(stage, kind, complete, config, killed, rng)
            number += 1
            made += how is not None
            print(how or f"{stage} was complete", flush=True)
    finish(config, killed)
    assert finish(config, killed).count(": complete, skipped") == len(STAGES)
    for run in ("", "guide"):
        assert_same_series(killed / run, whole / run)
    exported = [next((each / "hf").glob("step_*/model.safetensors")).read_bytes() for each in (killed, whole)]
    assert exported[0] == exported[1]
    assert evaluation(killed) == evaluation(whole)
    print(f"{made} kills: metrics, weights and evaluation are those of an uninterrupted pipeline")


if __name__ == "__main__":
    command.run(soak, __doc__, "kills", 3)
