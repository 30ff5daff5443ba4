"""Metrics of the miniature, against small cases computed by hand."""

import json
from pathlib import Path

import pytest
import torch

from megatron_tgdpo.errors import UserError
from tools.examples.paper_in_miniature import __main__
from tools.examples.paper_in_miniature.credit import agreement
from tools.examples.paper_in_miniature.results import best_rate
from tools.examples.paper_in_miniature.statistics import seed_interval, win_rate
from tools.examples.paper_in_miniature.study import DPO, SHORT, Arm, Study


def test_seed_interval_is_students() -> None:
    # Standard error of 1, 2, 3, 4, 5: sqrt(2.5 / 5); the table's t for 4 degrees of freedom is 2.776.
    found = seed_interval([1, 2, 3, 4, 5])
    assert (found.value, found.low, found.high) == pytest.approx((3, 3 - 1.963, 3 + 1.963), abs=1e-3)
    assert (seed_interval([2.0]).low, seed_interval([2.0]).value) == (None, 2.0)


def test_win_rate_counts_ties_half() -> None:
    assert win_rate([1.0, 0.5, 0.2, 0.3], [0.5, 0.5, 0.4, 0.0]) == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_agreement() -> None:
    rewards = [torch.tensor([0.1, -0.2, 0.3]), torch.tensor([-0.4, 0.5])]
    credits_ = [torch.tensor([1.0, -1.0, 1.0]), torch.tensor([-1.0, 0.0])]
    found = agreement(rewards, credits_)
    # Means 0.06 and 0; products 0.1 + 0.2 + 0.3 + 0.4 = 1; squares 0.55 - 5 * 0.0036 and 4.
    assert found["pearson"] == pytest.approx(1 / (0.532 * 4) ** 0.5, rel=1e-6)
    # Ranks 3, 2, 4, 1, 5 and 4.5, 1.5, 4.5, 1.5, 3, around 3.
    assert found["spearman"] == pytest.approx((0 + 1.5 + 1.5 + 3 + 0) / (10 * 9) ** 0.5, rel=1e-6)
    assert found["auc_bad"] == 1.0
    assert (found["reward_good"], found["reward_bad"]) == pytest.approx((0.2, -0.3))
    assert found["sequence_pearson"] == pytest.approx(1.0)
    assert found["tokens"] == 5


def test_best_rate_is_that_of_the_tuning_seed(tmp_path: Path) -> None:
    study = Study(tmp_path, SHORT)
    for seed, rate, values in ((0, 3e-4, [0.1, 0.2]), (0, 1e-3, [0.0, 0.4]), (1, 3e-4, [1.0, 1.0])):
        path = study.judged(seed, DPO, rate)
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([{"score": value} for value in values]), encoding="utf-8")
    assert best_rate(study, DPO) == 1e-3


def test_arms_have_names_of_their_own(tmp_path: Path) -> None:
    arms = Study(tmp_path, SHORT).arms
    assert [arm.name for arm in arms] == [
        "dpo", "simpo", "tgdpo-dpo-alpha0", "tgdpo-dpo-alpha0.5", "tgdpo-simpo-alpha0.5",
    ]  # fmt: skip
    assert Arm("tgdpo", "simpo", 0.5).title == "TGDPO, SimPO guide, alpha 0.5"


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").touch()
    assert __main__.main(["--out", str(other)]) == 1
    assert "not empty, and holds no study: name another directory" in capsys.readouterr().err
    __main__.open_study(tmp_path / "study", SHORT)
    assert __main__.main(["--out", str(tmp_path / "study"), "--short", "--beta", "0.5"]) == 1
    assert f"this study has beta {SHORT.beta}, not 0.5" in capsys.readouterr().err
    assert __main__.main(["--out", str(tmp_path / "study"), "--short", "--alphas", "0", "1", "0.2"]) == 1
    assert "this study has alphas [0.5], not [0.2, 1.0]" in capsys.readouterr().err
    assert __main__.main(["--out", str(other / "letter.txt" / "x")]) == 1
    assert "cannot write there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        __main__.main(["--out", str(tmp_path / "new"), "--workers", "0"])


def test_a_failing_command_is_named(tmp_path: Path) -> None:
    from tools.examples.paper_in_miniature.jobs import Command, Job, run_jobs

    absent = tmp_path / "absent"
    command = Command(
        "tools.examples.paper_in_miniature.judge",
        ("--model", str(absent), "--prompts", str(absent), "--out", str(tmp_path / "out"), "--temperature", "1",
         "--seed", "0"),
        tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"^judging: exit status 1 of python -m tools\.examples\.paper_in_miniature\.judge .*absent"
    ):
        run_jobs("title", [Job("judging", (command,), tmp_path / "log")], workers=1)
