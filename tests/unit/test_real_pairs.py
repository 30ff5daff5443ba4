"""tools.examples.real_pairs: which pairs, which commands, what is repeated, and the numbers."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

import tgdpo.generate
import tgdpo.report
from megatron_tgdpo.config.loading import load_config
from megatron_tgdpo.errors import UserError
from tgdpo.child_processes import Commands
from tools.examples.real_pairs import __main__ as command
from tools.examples.real_pairs.results import TITLES, collect, draw, finished_splits, sample_report, text_report
from tools.examples.real_pairs.study import CONFIG, GUIDES, QUESTIONS, Settings, Step, Study

# Of guide and policy by split and guide: held-out accuracy and margin.
FOUND = {(1, "dpo"): ((0.6, 0.2), (0.7, 0.3)), (1, "simpo"): ((0.5, 0.1), (0.6, 0.2)),
         (2, "dpo"): ((0.8, 0.4), (0.7, 0.5)), (2, "simpo"): ((0.6, 0.0), (0.9, 0.1))}  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> Study:
    pairs = [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(10)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    settings = Settings("MODEL", str(tmp_path / "pairs.json"), 6, 3, ("precision.dtype=fp32",))
    found = Study(tmp_path / "out", settings)
    found.open()
    return found


def prompts(study: Study, split: int, name: str) -> list[str]:
    text = (study.directory(split) / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["prompt"] for line in text.splitlines()]


def write_results(study: Study, words: tuple[str, ...]) -> None:
    """What a command would: its result file."""
    out = Path(words[words.index("--out") + 1]) if "--out" in words else None
    if words[0] == "pipeline":
        run = Path(next(word.partition("=")[2] for word in words if word.startswith("output_dir=")))
        (run / "checkpoints").mkdir(parents=True)
        models: dict[str, Any] = {"reference": {"accuracy": {"value": 0.5}, "accuracy_per_token": {"value": 0.4}}}
        of = FOUND[int(run.parent.name[5:]), run.name]
        for role, (accuracy, margin) in zip(("guide", "tgdpo"), of, strict=True):
            values = {"accuracy": accuracy, "accuracy_per_token": accuracy, "margin": margin}
            models[role] = {name: {"value": value} for name, value in values.items()}
        content = {"models": models, "beta": 0.1, "max_length": 64, "max_prompt_length": 32, "dtype": "fp32"}
        (run / "evaluation.json").write_text(json.dumps(content))
        steps = [{"step": 1 + at, "guidance/weight_std": 0.1 + 0.2 * at, "guidance/weight_mean": 1.0,
                  "guidance/negative_fraction": 0.0} for at in range(2)]  # fmt: skip
        (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    elif words[0] == "generate":
        assert out is not None
        questions = json.loads(QUESTIONS.read_text(encoding="utf-8"))
        out.write_text(json.dumps([{"output": f"{out.stem} says\n{at}"} for at, _ in enumerate(questions)]))
    else:
        assert out is not None
        out.write_text("<html>")


def test_splits_are_disjoint_differ_and_are_drawn_once(study: Study) -> None:
    for split in (1, 2):
        study.prepare(split)
        train, held_out = prompts(study, split, "train"), prompts(study, split, "heldout")
        assert (len(train), len(held_out)) == (6, 3)
        assert len({*train, *held_out}) == 9
    assert prompts(study, 1, "train") != prompts(study, 2, "train")
    before = prompts(study, 1, "train")
    study.prepare(1)
    assert prompts(study, 1, "train") == before


def test_too_few_pairs_and_another_study_are_refused(study: Study) -> None:
    other = Settings("MODEL", study.settings.pairs, 8, 3, study.settings.overrides)
    with pytest.raises(UserError, match=r"pairs\.json: has 10 pairs, not 11: lower --train or --held-out"):
        Study(study.root / "other", other).prepare(1)
    with pytest.raises(UserError, match=r"study\.json: this study has train 6, not 8"):
        Study(study.root, other).open()
    with pytest.raises(UserError, match="holds no study"):
        Study(study.root.parent, other).open()


def test_commands_read_their_arguments(study: Study) -> None:
    for guide, step in zip(GUIDES, study.trainings(3), strict=True):
        config = load_config(CONFIG, [word for word in step.words[2:] if "=" in word])
        assert (config.loss.method, config.guide.method, config.train.seed) == ("tgdpo", guide, 3)
        assert config.guide_dir == str(study.run(3, guide) / "guide")
        assert step.result.parent == Path(config.output_dir)
    for step in study.illustrations():
        module = {"report": tgdpo.report, "generate": tgdpo.generate}[step.words[0]]
        assert module.parse_arguments(step.words[1:]).out == step.result


def test_a_study_that_failed_goes_on_and_what_is_finished_is_not_repeated(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []
    failing = {"simpo"}

    def run(self: Commands, words: list[str]) -> int:
        started.append(" ".join(words))
        if words[3] == "pipeline" and failing & {word.removeprefix("guide.method=") for word in words}:
            return 3
        write_results(study, tuple(words[3:]))
        return 0

    monkeypatch.setattr(Commands, "run", run)
    with pytest.raises(SystemExit, match="3"):
        command.conduct(study, 2, keep_weights=False)
    assert len(started) == 2
    assert finished_splits(study) == []
    failing.clear()
    command.conduct(study, 2, keep_weights=False)
    assert len(started) == 2 + 3 + 7
    assert len(set(started)) == 2 + 3 + 7 - 1
    assert not list(study.root.rglob("checkpoints"))
    assert json.loads((study.root / "seconds.json").read_text())["split 2: simpo guide, TGDPO with it"].keys() == {
        "wall", "cpu",
    }  # fmt: skip
    command.conduct(study, 2, keep_weights=False)
    assert len(started) == 2 + 3 + 7

    found = collect(study, finished_splits(study))
    assert found["splits"] == [1, 2]
    guided = found["arms"]["tgdpo_simpo"]
    assert guided["accuracy"]["splits"] == [0.6, 0.9]
    assert guided["accuracy"]["value"] == pytest.approx(0.75)
    # Student's with one degree of freedom: 12.706 standard errors.
    assert guided["accuracy"]["high"] - 0.75 == pytest.approx(12.706 * statistics.stdev([0.6, 0.9]) / 2**0.5, rel=1e-4)
    assert guided["margin_less_dpos"]["splits"] == pytest.approx([0.0, -0.3])
    assert found["arms"]["dpo"]["margin"]["splits"] == [0.2, 0.4]
    assert "margin_less_dpos" not in found["arms"]["dpo"]
    assert guided["weight_std"]["value"] == pytest.approx(0.2)
    text = text_report(found)
    assert all(title in text for title in TITLES.values())
    assert "tgdpo_dpo: answers_tgdpo_dpo says 2" in sample_report(study)
    draw(found, study.root / "a.svg")
    draw(json.loads(json.dumps(found)), study.root / "b.svg")
    assert (study.root / "a.svg").read_bytes() == (study.root / "b.svg").read_bytes()
    capsys.readouterr()


def test_a_command_is_one_of_tgdpos(study: Study) -> None:
    step = Step("name", ("plan",), study.root)
    assert step.command[1:] == ["-m", "tgdpo", "plan"]
