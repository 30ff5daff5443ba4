"""``export.hf``: which checkpoints become HF directories, what is in them, and what a run says at its end."""

import json
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tgdpo.signals import STOPPED_STATUS
from tests.distributed.common import assert_same_weights, make_problem, merged, read_metrics, write_pairs
from tests.forked import Forked
from tests.processes import run_forked
from tests.series import wait_for_step
from tgdpo import evaluate, generate

BASE_CARD = "---\nlicense: other\nlicense_name: a-licence\nlanguage: [en]\n---\n# Base\n"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {{ eos_token }} {% endfor %}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("exports")
    problem = make_problem(root, layers=2)
    (root / "policy" / "README.md").write_text(BASE_CARD)
    (root / "template.jinja").write_text(TEMPLATE)
    write_pairs(root / "held_out.jsonl", 4)
    return merged(
        problem,
        data={"validation": str(root / "held_out.jsonl"), "chat_template": str(root / "template.jinja")},
        loss={"alpha": 0.25},
        train={"steps": 4},
        checkpoint={"every_steps": 2, "keep": 1},
        preflight={"enabled": False},
    )


def write_config(directory: Path, config: dict[str, Any], **sections: Any) -> str:
    file = directory / "config.yaml"
    file.write_text(json.dumps(merged(config, **sections, output_dir=str(directory / "my-run"))))
    return str(file)


def exported(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "my-run" / "hf").glob("*"))


def said(log: str, beginning: str) -> str:
    """What follows a beginning in the one line that has it."""
    (line,) = [line for line in log.splitlines() if beginning in line]
    return line.split(beginning)[1]


def test_the_last_checkpoint_is_exported_with_a_card_and_its_use(config: dict[str, Any], tmp_path: Path) -> None:
    log = run_forked("tgdpo.train", [write_config(tmp_path, config, export={"hf": "end"})], processes=2).stderr
    run = tmp_path / "my-run"
    assert exported(tmp_path) == ["step_00000004"]
    hf, checkpoint = run / "hf" / "step_00000004", run / "checkpoints" / "step_00000004"
    # Weights to the bit, and transformers' logits against the checkpoint's.
    run_forked("checkpoints_convert.verify", ["--hf", str(hf), "--megatron", str(checkpoint)])
    assert (hf / "chat_template.jinja").read_text() == TEMPLATE
    base = Path(config["model"]["policy"])
    for name in ("tokenizer.json", "generation_config.json"):
        assert (hf / name).read_bytes() == (base / name).read_bytes()

    card = (hf / "README.md").read_text()
    front = yaml.safe_load(re.split(r"^---$", card, flags=re.M)[1])
    assert front["license"] == "other"
    assert front["license_name"] == "a-licence"
    assert "base_model" not in front
    assert card.split("---\n")[2].startswith("\n# my-run\n")
    for row in (
        "| method | tgdpo, beta 0.1, alpha 0.25 |",
        "| began as | policy |",
        "| reference | policy |",
        "| guide | guide |",
        "| training data | pairs.jsonl, 32 pairs |",
        "| validation data | held_out.jsonl, 4 pairs |",
        "| chat template | template.jinja |",
    ):
        assert row in card.splitlines()
    last = read_metrics(run)[-1]
    for name in ("train/loss", "eval/rewards/margins"):
        assert f"| {name} | {last[name]:.4g} |" in card
    for file in hf.iterdir():
        assert str(tmp_path.parent).encode() not in file.read_bytes(), file

    assert said(log, "from_pretrained") == f"({str(hf)!r})"
    assert evaluate.parse_arguments(shlex.split(said(log, "tgdpo evaluate "))).model == [("my-run", hf)]
    assert generate.parse_arguments(shlex.split(said(log, "tgdpo generate "))).model == hf


def test_the_best_checkpoint_is_exported_at_the_end(config: dict[str, Any], tmp_path: Path) -> None:
    best = {"every_steps": 100, "best_metric": "eval/loss"}
    file = write_config(tmp_path, config, export={"hf": "best"}, eval={"every_steps": 1}, checkpoint=best)
    given = json.dumps({"values": {1: 3.0, 2: 1.0, 3: 1.5, 4: 2.0}})
    log = run_forked("tests.distributed.worker_best", [given, file]).stderr
    assert exported(tmp_path) == ["step_00000002"]
    assert "by eval/loss 1: " in log
    card = (tmp_path / "my-run" / "hf" / "step_00000002" / "README.md").read_text()
    assert "Best by eval/loss (min): this step, 1." in card
    assert "| eval/loss | 1 | 2 |" in card


def test_every_checkpoint_is_exported_when_it_is_saved(config: dict[str, Any], tmp_path: Path) -> None:
    """Those that are removed later, too; what it costs is among the metrics."""
    file = write_config(tmp_path, config, export={"hf": "every_save"}, train={"steps": 5})
    run_forked("tgdpo.train", [file], processes=2)
    assert exported(tmp_path) == ["step_00000002", "step_00000004", "step_00000005"]
    metrics = read_metrics(tmp_path / "my-run")
    assert all("perf/export_seconds" in step for step in metrics if "perf/checkpoint_seconds" in step)
    assert any(step.get("perf/export_seconds", 0) > 0 for step in metrics)


def test_without_an_export_the_command_is_said(config: dict[str, Any], tmp_path: Path) -> None:
    """It makes what the run would have made."""
    log = run_forked("tgdpo.train", [write_config(tmp_path, config)]).stderr
    assert exported(tmp_path) == []
    run_forked("checkpoints_convert.megatron_to_hf", shlex.split(said(log, "tgdpo convert to-hf ")))
    assert exported(tmp_path) == ["step_00000004"]
    by_command = tmp_path / "my-run" / "hf" / "step_00000004"
    run_forked(
        "tgdpo.train", [write_config(tmp_path, config, export={"hf": "end"}), f"output_dir={tmp_path / 'other'}"]
    )
    by_run = tmp_path / "other" / "hf" / "step_00000004"
    assert_same_weights(by_command, by_run)
    assert {file.name for file in by_command.iterdir()} == {file.name for file in by_run.iterdir()}


def test_an_export_that_fails_does_not_lose_the_run(config: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "my-run"
    run.mkdir()
    (run / "hf").write_text("in the way")
    file = write_config(tmp_path, config, export={"hf": "end"})
    done = run_forked("tgdpo.train", [file], processes=2, check=False)
    assert done.returncode
    assert "Traceback" not in done.stderr
    command = said(done.stderr, "; the checkpoint is as it was, to export it again: tgdpo convert to-hf ")
    assert (run / "DONE").exists()
    (run / "hf").unlink()
    card = run / "hf" / "step_00000004" / "README.md"
    run_forked("checkpoints_convert.megatron_to_hf", shlex.split(command))
    made = card.stat().st_mtime_ns
    # What is there is not made again, what is missing is.
    run_forked("tgdpo.train", [file])
    assert card.stat().st_mtime_ns == made
    shutil.rmtree(run / "hf")
    run_forked("tgdpo.train", [file])
    assert card.exists()


def test_a_run_that_is_stopped_exports_nothing_and_says_what_to_run(config: dict[str, Any], tmp_path: Path) -> None:
    file = write_config(
        tmp_path, config, export={"hf": "end"}, train={"steps": 100_000}, checkpoint={"every_steps": 50}
    )
    log = tmp_path / "log"
    rank = Forked("tgdpo.train", [file], {}, log, log)
    try:
        wait_for_step(tmp_path / "my-run", 1, lambda: rank.poll() is None)
        rank.send_signal(signal.SIGTERM)
        assert rank.wait(timeout=900) == STOPPED_STATUS
    finally:
        rank.kill()
    assert not (tmp_path / "my-run" / "hf").exists()
    text = log.read_text()
    assert "start the same command again to continue" in text
    command = shlex.split(said(text, "what is saved can be exported: tgdpo convert to-hf "))
    assert command == ["--megatron", str(tmp_path / "my-run"), "--out", "DIR"]


def test_the_library_alone_cannot_export(config: dict[str, Any], tmp_path: Path) -> None:
    done = run_forked("megatron_tgdpo.train", [write_config(tmp_path, config, export={"hf": "end"})], check=False)
    assert done.returncode == 1
    assert "error: export.hf is end: only tgdpo train exports" in done.stderr
