"""From one config to the aligned model: stages in their order, each once, and none that takes a half for a whole."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_tgdpo.resilience.run_lock import RunLock
from tests.distributed.common import make_problem, merged, read_metrics, write_pairs
from tests.processes import run_forked
from tgdpo import pipeline
from tgdpo.child_processes import Commands
from tgdpo.commands import COMMANDS, CONVERSIONS

STAGES = ["guide", "guidance", "train", "export", "evaluate"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    config = merged(
        make_problem(root, layers=2),
        model={"guide": None},
        guide={"method": "dpo", "beta": 0.01, "lr": 2e-3, "steps": 3},
        guidance={"mode": "cached", "cache": str(root / "cache")},
        train={"steps": 2},
        preflight={"enabled": False},
        checkpoint={"every_steps": 1},
    )
    config["data"]["validation"] = config["data"]["train"]
    (root / "config.yaml").write_text(json.dumps(config))
    return root / "config.yaml"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words after ``tgdpo`` of what was run, in processes that are forked instead of started."""
    seen: list[list[str]] = []

    def forked(commands: Commands, command: Sequence[str]) -> int:
        words = list(command)
        arguments, ranks = words[words.index("tgdpo") + 1 :], 1
        if "--nproc" in arguments:
            at = arguments.index("--nproc")
            _, ranks = arguments.pop(at), int(arguments.pop(at))
        seen.append(arguments)
        known = {one.name: one.module for one in COMMANDS} | {f"convert {one.name}": one.module for one in CONVERSIONS}
        name, *others = [" ".join(arguments[:2]), *arguments[2:]] if arguments[0] == "convert" else arguments
        done = run_forked(known[name], others, processes=ranks, check=False)
        print(done.stderr)
        return done.returncode

    monkeypatch.setattr(Commands, "run", forked)
    return seen


def finished(arguments: list[str]) -> int:
    try:
        pipeline.main(arguments)
    except SystemExit as ended:
        return int(str(ended.code))
    return 0


def test_from_one_config_to_the_aligned_model(
    config_file: Path, run: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = config_file.parent, config_file.parent / "run"
    command = [str(config_file), "--prompts", "0", "--nproc", "2"]
    # A guide that stops before its end is not taken for whole.
    assert finished([*command, "train.exit_step=2", "parallel.tensor=2"]) == 1
    assert "guide: ended before its end" in capsys.readouterr().err
    assert not (out / "guide" / "DONE").exists()
    refused = run_forked("megatron_tgdpo.train", [str(config_file)], check=False)
    assert refused.returncode == 1
    assert f"error: the guide {out}/guide is trained only in part: tgdpo dpo-guide" in refused.stderr
    run.clear()

    assert finished(command) == 0
    printed = capsys.readouterr().out
    assert [words[0] for words in run] == ["train", "guidance", "train", "convert", "evaluate"]
    for number, stage in enumerate(STAGES, start=1):
        assert f"=== {number}/5 {stage}\n" in printed
    assert f"tgdpo train --nproc 2 --guide {config_file}\n" in printed
    # What each stage says at its end to go on with.
    assert f"train with it: tgdpo train --nproc 2 {config_file}\n" in printed
    assert f"see what it rewards: tgdpo report {config_file} --out report.html\n" in printed
    assert f"train with it: tgdpo train {config_file}\n" in printed
    assert f"compare it: tgdpo evaluate --reference {root}/policy --model run={out} --guide {out}/guide/" in printed
    assert "eval at step 2: loss " in printed
    assert "step 1: policy and reference are the same, so loss is ln 2" in printed
    assert [step["step"] for step in read_metrics(out / "guide")] == [1, 2, 3]
    recorded = json.loads((out / "guide" / "checkpoints" / "step_00000003" / "tgdpo.json").read_text())["config"]
    assert (recorded["loss"]["method"], recorded["loss"]["beta"], recorded["optimizer"]["lr"]) == ("dpo", 0.01, 2e-3)
    assert (recorded["model"]["policy"], recorded["model"]["guide"]) == (str(root / "policy"), None)
    pins = json.loads((out / "hub.json").read_text())["run"]
    assert pins == {str(out / "guide"): str(out / "guide" / "checkpoints" / "step_00000003")}
    assert "guidance/guide_accuracy" in read_metrics(out)[-1]
    assert list(json.loads((out / "evaluation.json").read_text())["models"]) == ["reference", "tgdpo", "guide"]
    assert (out / "hf" / "step_00000002" / "model.safetensors").exists()

    run.clear()
    assert finished(command) == 0
    assert capsys.readouterr().out.count(": complete, skipped") == 5
    assert run == []
    pipeline.main([*command, "--list"])
    assert capsys.readouterr().out == f"output_dir\t{out}\n" + "".join(f"{stage}\tcomplete\n" for stage in STAGES)

    # Another guide, by value or by data, is said before anything runs; the table alone is made anew.
    assert finished([*command, "guide.beta=0.5"]) == 1
    assert "was trained with other values than section guide and the config say: loss.beta 0.5, was 0.01" in (
        capsys.readouterr().err
    )
    assert run == []
    (out / "evaluation.json").unlink()
    assert finished(command) == 0
    assert [words[0] for words in run] == ["evaluate"]

    # Another run that names the same guide has it reused, unless its data are other ones.
    pairs = (root / "pairs.jsonl").read_text().splitlines(keepends=True)
    (root / "others.jsonl").write_text("".join(pairs[:20]))
    other = [str(config_file), f"output_dir={root}/other", f"guide.output_dir={out}/guide", "guidance.mode=colocated"]
    refused = run_forked("megatron_tgdpo.train", [*other, f"data.train={root}/others.jsonl"], check=False)
    assert refused.returncode == 1
    assert "was trained with other values than section guide and the config say: data.train of other token ids" in (
        refused.stderr
    )
    run_forked("megatron_tgdpo.train", [*other, f"output_dir={root}/third"])

    # Further steps are exported beside the earlier ones, and compared anew.
    run.clear()
    longer = [*command, "train.steps=3", "train.resume=changed"]
    assert finished(longer) == 0
    assert [words[0] for words in run] == ["train", "convert", "evaluate"]
    assert sorted(path.name for path in (out / "hf").iterdir()) == ["step_00000002", "step_00000003"]
    # An export of earlier weights is not taken for one of the last.
    last = out / "checkpoints" / "step_00000003"
    (last / "tgdpo.json").touch()
    assert finished(longer) == 1
    assert f"{out}/hf/step_00000003: not an export of {last}: remove it" in capsys.readouterr().err


def test_what_training_exports_is_not_exported_again(
    config_file: Path, tmp_path: Path, run: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(config_file), f"output_dir={tmp_path}/run", "guidance.mode=colocated", "--prompts", "0"]
    best = ["export.hf=best", "checkpoint.best_metric=eval/rewards/margins", "eval.every_steps=1"]
    assert finished([*command, *best]) == 0
    assert [words[0] for words in run] == ["train", "train", "evaluate"]
    (exported,) = (tmp_path / "run" / "hf").iterdir()
    assert f"tgdpo={exported}" in run[-1]
    chosen = "the checkpoint was chosen by eval/rewards/margins on data.validation, on which it was evaluated, too"
    assert chosen in capsys.readouterr().out
    # On pairs that chose nothing it is evaluated anew.
    test = tmp_path / "test.jsonl"
    assert finished([*command, *best, f"data.test={test}"]) == 1
    assert f"error: data.test {test}: no such file" in capsys.readouterr().err
    write_pairs(test, 8)
    assert finished([*command, *best, f"data.test={test}"]) == 0
    assert [words[0] for words in run] == ["train", "train", "evaluate", "evaluate"]
    assert str(test) in run[-1]
    assert chosen not in capsys.readouterr().out
    # Nobody asked for the guide's.
    assert not (tmp_path / "run" / "guide" / "hf").exists()


def test_two_pipelines_do_not_share_a_directory(
    config_file: Path, tmp_path: Path, run: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = [str(config_file), f"output_dir={out}", "--prompts", "0"]
    other = RunLock(out, interval=0.1, name=pipeline.LOCK_FILE)
    other.acquire()
    try:
        assert finished(command) == 1
    finally:
        other.release()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {out}: process {os.getpid()} on ")
    assert line.endswith("is writing to it: wait for its end, stop it, or choose another output_dir")
    assert run == []
    # Whoever was killed keeps nobody out, and nothing of it is left.
    with subprocess.Popen(["true"]) as gone:
        pass
    owner = {"id": "x", "pid": gone.pid, "host": other._owner["host"]}
    (out / pipeline.LOCK_FILE).write_text(json.dumps(owner))
    assert finished([*command, "model.policy=nowhere"]) == 1
    assert [words[:2] for words in run] == [["train", "--guide"]]
    assert not (out / pipeline.LOCK_FILE).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "exprot"], "--only exprot: {file} has no such stage: choose one of guide, guidance, train, export"),
        (["model.policy=nowhere"], None),
        (["guide.method=null", "guide.beta=null", "guide.lr=null", "guide.steps=null"], "needs model.guide"),
    ],
)
def test_bad_input_is_one_line(
    config_file: Path, tmp_path: Path, run: list[list[str]], arguments: list[str], message: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [str(config_file), f"output_dir={tmp_path}/run", f"guidance.cache={tmp_path}/cache", *arguments]
    assert finished(given) == 1
    printed = capsys.readouterr()
    if message is None:  # the first stage says it, and is the last that runs
        assert [words[:2] for words in run] == [["train", "--guide"]]
        assert "error: model.policy nowhere: no such directory" in printed.out
    else:
        assert run == []
        (line,) = printed.err.splitlines()
        assert line.startswith("error: ")
        assert message.format(file=config_file) in line


def test_dpo_guide_takes_the_usual_values_as_options(config_file: Path, tmp_path: Path) -> None:
    options = ["--beta", "0.2", "--lr", "1e-4", "--dry-run", f"output_dir={tmp_path}/run"]
    shown = run_forked("tgdpo.dpo_guide", [str(config_file), *options]).stdout
    for line in ("method: dpo", "beta: 0.2", "lr: 0.0001", "steps: 3", f"output_dir: {tmp_path}/run/guide"):
        assert line in shown
    # Without the section: DPO, as long as the policy is trained.
    values = json.loads(config_file.read_text())
    del values["guide"]
    (tmp_path / "plain.yaml").write_text(json.dumps(values))
    shown = run_forked("tgdpo.dpo_guide", [str(tmp_path / "plain.yaml"), "--method", "simpo", "--dry-run"]).stdout
    assert "method: simpo" in shown
    assert "steps: 2" in shown
    shown = run_forked("tgdpo.dpo_guide", [str(tmp_path / "plain.yaml"), "--dry-run"]).stdout
    assert "method: dpo" in shown
