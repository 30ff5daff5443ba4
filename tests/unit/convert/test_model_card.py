"""What a model card says of a run whose directory has moved, and what it keeps to itself."""

import json
from pathlib import Path
from typing import Any

import yaml

from checkpoints_convert.model_card import model_card

BEST = {"metric": "eval/loss", "mode": "min", "value": 0.5, "step": 4, "basis": "x"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def config(**model: Any) -> dict[str, Any]:
    return {
        "model": {"policy": f"owner/base@{COMMIT}", "reference": None, "guide": "/home/somebody/runs/guide", **model},
        "data": {
            "train": [{"path": "/home/somebody/a.jsonl", "weight": 2.0}, f"owner/pairs@{COMMIT}"],
            "validation": {"code": "/home/somebody/code.jsonl"},
            "max_length": 64,
        },
        "loss": {"method": "tgdpo", "beta": 0.1, "alpha": 0.5, "gamma": None},
        "batch": {"global_pairs": 8},
        "precision": {"dtype": "bf16", "fp8": "none"},
        "output_dir": "/home/somebody/runs/aligned",
    }


def card_of(checkpoint: Path, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    card = model_card(checkpoint, {"config": values, "step": 4})
    assert card is not None
    assert "somebody" not in card
    front, text = card.removeprefix("---\n").split("\n---\n")
    return yaml.safe_load(front), text.splitlines()


def test_names_of_the_hub_are_told_whole_and_paths_are_not(tmp_path: Path) -> None:
    front, lines = card_of(tmp_path / "step_00000004", config())
    assert front["base_model"] == "owner/base"
    assert front["tags"][0] == "tgdpo"
    assert f"| began as | owner/base@{COMMIT} |" in lines
    assert "| guide | guide |" in lines
    assert f"| training data | a.jsonl, weight 2; owner/pairs@{COMMIT} |" in lines
    assert "| validation code data | code.jsonl |" in lines
    assert "## Metrics" not in lines


def test_a_path_that_is_not_here_is_no_name_of_the_hub(tmp_path: Path) -> None:
    front, lines = card_of(
        tmp_path / "step_00000004", config(policy="models/base", guide="runs/dpo/checkpoints/step_7")
    )
    assert "base_model" not in front
    assert "| began as | base |" in lines
    assert "| guide | dpo/checkpoints/step_7 |" in lines


def test_metrics_are_those_of_the_step_and_of_the_last(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    records = [{"step": n, "train/loss": n / 10, "eval/code/loss": n / 100} for n in range(1, 7)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    _, lines = card_of(run / "checkpoints" / "step_00000004", config())
    assert "| metric | step 4 | step 6, the last so far |" in lines
    assert "| train/loss | 0.4 | 0.6 |" in lines
    assert "| eval/code/loss | 0.04 | 0.06 |" in lines


def test_what_is_wrong_in_the_log_is_passed_over(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [
        '{"step": 4, "train/loss": 0.4, "train/lr": "high", "train/grad_norm": null}',
        "{}",
        "[]",
        '{"step": 5, "tra',
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (run / "best.json").write_text(json.dumps({**BEST, "value": 10**400}))
    _, found = card_of(run / "checkpoints" / "step_00000004", config())
    assert "| train/loss | 0.4 |" in found
    assert not any(line.startswith("Best by") for line in found)
    (run / "best.json").write_text(json.dumps({**BEST, "metric": "`eval`\n<b>loss</b>"}))
    _, found = card_of(run / "checkpoints" / "step_00000004", config())
    assert r"Best by \`eval\` \<b\>loss\</b\> (min): this step, 0.5." in found
    assert "It was chosen by this figure, which therefore flatters it: compare it on other data." in found


def test_names_are_not_markdown(tmp_path: Path) -> None:
    values = config()
    values["data"] |= {"train": "/home/somebody/![x](y) <img>|.jsonl", "template_kwargs": {"key": "a secret"}}
    _, lines = card_of(tmp_path / "step_00000004", values)
    assert r"| training data | \!\[x\](y) \<img\>\|.jsonl |" in lines
    assert "a secret" not in "".join(lines)
    assert "| chat template's variables | key |" in lines


def test_what_is_not_of_training_has_no_card(tmp_path: Path) -> None:
    assert model_card(tmp_path, {"step": None, "dtype": "bf16"}) is None
