"""What launch/pipeline.sh submits, with an sbatch that only writes down what it is asked for; no Slurm is needed."""

import json
import subprocess
import sys
from pathlib import Path

from tests.launch import PATIENCE, ROOT, environment
from tests.unit.config.test_loading import VALID

# An id for each job, as a cluster of several answers, and the words, one a line.
SBATCH = """#!/bin/sh
echo x >>"$FOLDER/count"
number=$(wc -l <"$FOLDER/count")
printf '%s\\n' "$@" >"$FOLDER/job$((number))"
echo "$((100 + number));cluster"
"""


def submit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    sbatch = folder / "sbatch"
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    variables = environment()
    variables |= {"FOLDER": str(folder), "TGDPO_PYTHON": sys.executable, "TGDPO_TRAIN_OPTIONS": "--nodes=2 --time=9"}
    variables["PATH"] = f"{folder}:{variables['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "pipeline.sh"), *arguments],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip


def test_the_stages_are_a_chain_of_jobs(tmp_path: Path) -> None:
    config = {**VALID, "model": {"policy": "policy"}, "guide": {"method": "dpo", "beta": 0.01}}
    config["guidance"] = {"mode": "cached", "cache": "cache"}
    config["data"] = {"train": "pairs.jsonl", "validation": {"one": "one.jsonl"}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    given = [str(tmp_path / "config.yaml"), f"output_dir={tmp_path}/a run", "loss.alpha=0.2"]
    done = submit(tmp_path, *given)
    assert done.returncode == 0, done.stderr
    stages = ["guide", "guidance", "train", "export", "evaluate/one"]
    lines = [f"{name}: job {101 + i}{f' after {100 + i}' if i else ''}" for i, name in enumerate(stages)]
    assert done.stdout.splitlines() == [
        *lines,
        f"aligned model (HF): in {tmp_path}/a run/hf, a directory for each step that was exported",
    ]
    commands = {
        "guide": ["--nodes=2", "--time=9", f"{ROOT}/launch/train.sbatch", "--guide", *given],
        "train": ["--nodes=2", "--time=9", f"{ROOT}/launch/train.sbatch", *given],
    }
    for number, name in enumerate(stages, start=1):
        words = (tmp_path / f"job{number}").read_text().splitlines()
        stage = [f"{ROOT}/launch/stage.sbatch", "PYTHON", "-m", "tgdpo", "pipeline", *given, "--only", name]
        expected = commands.get(name, stage)
        assert words[-len(expected) :] == expected
        assert f"--output={tmp_path}/a run/slurm-%j-{name.replace('/', '-')}.out" in words
        assert (f"--dependency=afterok:{99 + number}" in words) == (number > 1)


def test_bad_input_submits_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps(VALID))
    config = str(tmp_path / "config.yaml")
    for arguments, message in (
        ([], "usage: bash launch/pipeline.sh CONFIG.yaml"),
        ([config, str(tmp_path / "out")], "not section.key=value; where the runs go, output_dir in the config says"),
        ([config, "loss.betta=1"], "loss.betta"),
    ):
        done = submit(tmp_path, *arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "count").exists()
