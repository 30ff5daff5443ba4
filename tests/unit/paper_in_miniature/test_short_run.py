"""The whole miniature at toy size: every file is made, alpha 0 is DPO, and an interrupted study ends alike."""

import json
from pathlib import Path

import pytest

from tools.examples.paper_in_miniature.__main__ import main
from tools.examples.paper_in_miniature.study import DPO, SHORT, Arm, Study


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mini") / "study"
    assert main(["--out", str(out), "--short", "--workers", "1"]) == 0
    return out


def test_results(root: Path) -> None:
    metrics = json.loads((root / "results.json").read_text(encoding="utf-8"))
    study = Study(root, SHORT)
    assert list(metrics["arms"]) == [arm.name for arm in study.arms]
    for name, arm in metrics["arms"].items():
        assert arm["rate"] in SHORT.rates
        assert arm["against"].keys() == {"sft", *metrics["arms"]} - {name}
        assert 0 <= arm["against"]["sft"]["value"] <= 1
    assert metrics["credit"].keys() == {"dpo", "simpo", "reference"}
    report = (root / "results.txt").read_text(encoding="utf-8")
    assert "TGDPO, SimPO guide, alpha 0.5" in report
    for plot in ("win_rates.svg", "credit.svg"):
        assert (root / plot).read_text(encoding="utf-8").rstrip().endswith("</svg>")


def test_alpha_0_is_dpo(root: Path) -> None:
    study = Study(root, SHORT)
    rate = json.loads((root / "results.json").read_text(encoding="utf-8"))["arms"]["dpo"]["rate"]
    runs = [study.directory(1, arm, rate) / "run" / "metrics.jsonl" for arm in (DPO, Arm("tgdpo", "dpo", 0.0))]
    dpo, guided = ([json.loads(line) for line in run.read_text(encoding="utf-8").splitlines()] for run in runs)
    assert [step["train/loss"] for step in guided] == pytest.approx([step["train/loss"] for step in dpo], rel=1e-5)
    assert len(dpo) > 1
    assert dpo[-1]["train/loss"] != dpo[0]["train/loss"]


def test_an_interrupted_study_goes_on(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (root / "results.json").read_text(encoding="utf-8")
    study = Study(root, SHORT)
    rate = json.loads(before)["arms"]["tgdpo-dpo-alpha0.5"]["rate"]
    judged = study.judged(1, Arm("tgdpo", "dpo", 0.5), rate)
    text = judged.read_text(encoding="utf-8")
    judged.unlink()
    (root / "results.json").unlink()
    assert main(["--out", str(root), "--short", "--workers", "1"]) == 0
    assert "TGDPO, reported seeds: 2 of 3 done before" in capfd.readouterr().out
    assert judged.read_text(encoding="utf-8") == text
    assert (root / "results.json").read_text(encoding="utf-8") == before
