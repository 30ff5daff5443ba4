"""The comparison of models: metrics against slower or hand-made computations, swapped guides, Megatron checkpoints."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel

from checkpoints_convert.import_hf import import_hf
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.intervals import Estimate, mean_interval, wilson
from megatron_tgdpo.models.hf_config import read_hf_config
from tests.reference import response_logps as one_by_one
from tests.tiny_models import make_llama, make_model, make_tokenizer
from tgdpo.evaluate import main
from tgdpo.generation import logps
from tgdpo.generation.compare_models import table_of
from tgdpo.generation.evaluation import PairScores, preference_metrics
from tgdpo.generation.models import fingerprint, hf_directory

ROWS = [([5, 6, 7], [8, 9, 10, 2]), ([11], [12, 2]), ([13, 14, 15, 16], [17]), ([5] * 9, [6, 7, 8, 9, 10, 11, 12])]


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("evaluate")
    return {name: make_llama(folder / name, layers=2, seed=seed) for seed, name in enumerate(("reference", "guide"))}


def write_pairs(path: Path, models: dict[str, Path], pairs: int = 12) -> Path:
    """Pairs labelled by the sign of the guide's reward, so that the guide is right in every one."""
    reference, guide = load(models["reference"]), load(models["guide"])
    tokenizer = make_tokenizer(131)
    lines = []
    for index in range(pairs):
        prompt, answers = f"w{20 + index}", [f"w{40 + index} w{60 + index}", f"w{80 + index}"]

        def reward(text: str, prompt: str = prompt) -> float:
            ids = [tokenizer.encode(prompt), [*tokenizer.encode(text), 2]]
            with torch.no_grad():
                return float((one_by_one(guide, *ids) - one_by_one(reference, *ids)).sum())

        rejected, chosen = sorted(answers, key=reward)
        lines.append(json.dumps({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}) + "\n")
    path.write_text("".join(lines))
    return path


def evaluate(folder: Path, pairs: Path, **options: object) -> tuple[int, Path]:
    out = folder / "results.json"
    chosen = {"pairs": pairs, "out": out, "prompts": 5, "max_new_tokens": 6, "batch": 2, **options}
    arguments = [part for key, value in chosen.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    return main(arguments), out


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logps_and_divergences_equal_one_by_one(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (load(make_model(tmp_path / str(seed), family, layers=2, seed=seed)) for seed in (0, 1))
    monkeypatch.setattr(logps, "_CHUNK", 3)
    for tokens_per_batch in (1, 20, 1000):
        results = logps.response_logps(first, ROWS, tokens_per_batch)
        divergences = logps.in_batches(
            "KL", ROWS, lambda batches: (logps.batch_divergences(first, second, batch) for batch in batches),
            tokens_per_batch,
        )  # fmt: skip
        for (prompt, response), values, divergence in zip(ROWS, results, divergences, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(values, one_by_one(first, prompt, response), rtol=1e-4, atol=1e-5)
                predictions = [model(torch.tensor([prompt + response])).logits[0].double() for model in (first, second)]
            for place in range(len(response)):
                p, q = (logits[len(prompt) - 1 + place].softmax(-1) for logits in predictions)
                expected = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a)
                assert divergence[place].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_preference_figures_by_hand() -> None:
    # Sums of log-probs and tokens of chosen and rejected in turn, three pairs.
    scores = PairScores(torch.tensor([-3.0, -4.0, -6.0, -2.0, -5.0, -5.0]).double(), torch.tensor([2, 1, 1, 2, 1, 5]))
    reference = PairScores(torch.tensor([-4.0, -3.0, -7.0, -4.0, -6.0, -6.0]).double(), scores.tokens)
    metrics = preference_metrics(scores, reference, beta=0.5)
    # Log-ratios +1 -1, +1 +2, +1 +1: margins 1, -0.5 and 0.
    assert metrics["accuracy"] == wilson(1, 3)
    assert (metrics["correct"], metrics["ties"], metrics["pairs"]) == (1, 1, 3)
    assert metrics["margin"] == mean_interval([1.0, -0.5, 0.0])
    assert metrics["reward_chosen"] == mean_interval([0.5, 0.5, 0.5])
    assert metrics["reward_rejected"] == mean_interval([-0.5, 1.0, 0.5])
    # Per token: -1.5 above -4, -6 below -1, -5 below -1.
    assert metrics["accuracy_per_token"] == wilson(1, 3)
    own = preference_metrics(scores, None, beta=0.5)
    assert own["accuracy"] == wilson(1, 3)
    assert own["margin"] is None


def test_a_swapped_guide_is_loudly_reported(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", models)
    status, out = evaluate(tmp_path, pairs, reference=models["reference"], guide=models["guide"])
    assert status == 0
    good, printed = json.loads(out.read_text()), capsys.readouterr()
    assert good["models"]["guide"]["accuracy"]["value"] == 1.0
    assert good["models"]["guide"]["warning"] is None
    assert "GUIDE" not in printed.err
    check_report(good, printed.out)
    status, out = evaluate(tmp_path, pairs, reference=models["guide"], guide=models["reference"])
    assert status == 0
    swapped = json.loads(out.read_text())["models"]["guide"]
    assert swapped["accuracy"]["value"] == 0.0
    assert swapped["margin"]["value"] == pytest.approx(-good["models"]["guide"]["margin"]["value"], rel=1e-5)
    assert "0 of 12 pairs" in swapped["warning"]
    assert swapped["warning"] in capsys.readouterr().err


def check_report(report: dict[str, Any], printed: str) -> None:
    assert (report["pairs"], report["prompts"]) == (12, 5)
    reference, guide = report["models"]["reference"], report["models"]["guide"]
    assert reference["margin"] is reference["kl_per_token"] is None
    assert guide["kl_per_token"]["value"] > 0.01
    assert guide["kl_per_token"]["low"] < guide["kl_per_token"]["value"] < guide["kl_per_token"]["high"]
    assert guide["reward_chosen"]["value"] - guide["reward_rejected"]["value"] == pytest.approx(
        guide["margin"]["value"], rel=1e-5
    )
    assert 1 <= guide["tokens"]["value"] <= 6
    _, *table, written = printed.splitlines()
    assert table[0].split() == ["reference", "guide"]
    assert {len(line) for line in table} == {len(table[0])}
    assert len(table[0]) <= 100
    (margin,) = [line for line in table if line.startswith("margin")]
    assert f"{guide['margin']['value']:+.3f} [{guide['margin']['low']:+.3f}, " in margin
    assert written.endswith("/results.json: written")
    assert (report["max_length"], report["dtype"]) == (PreprocessOptions.max_length, "fp32")
    assert "torch" in report["versions"]


def test_models_that_do_not_fit_beside_each_other_stand_below() -> None:
    estimate = Estimate(0.125, -0.5, 0.75)
    blocks = table_of({f"model{k}": {"margin": estimate, "accuracy": estimate} for k in range(5)}).split("\n\n")
    assert [block.split("\n")[0].split() for block in blocks] == [["model0", "model1", "model2"], ["model3", "model4"]]
    assert max(len(line) for block in blocks for line in block.split("\n")) <= 100
    assert blocks[1].count("+0.125 [-0.500, +0.750]") == 2


def alike(ours: Any, theirs: Any) -> bool:
    """Whether two reports say the same; weights at other places in memory may be summed in another order."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(alike(ours[name], theirs[name]) for name in theirs)
    return ours == (pytest.approx(theirs, rel=1e-5, abs=1e-5) if isinstance(theirs, float) else theirs)


def test_megatron_checkpoints_are_evaluated_as_their_models_are(
    models: dict[str, Path], tmp_path: Path, single_rank_group: dist.ProcessGroup
) -> None:
    checkpoint = tmp_path / "megatron"
    import_hf(models["guide"], checkpoint, read_hf_config(models["guide"]))
    with hf_directory(checkpoint, tmp_path) as exported:
        theirs, ours = load(exported).state_dict(), load(models["guide"]).state_dict()
    assert not exported.exists()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    pairs = write_pairs(tmp_path / "pairs.jsonl", models)
    _, out = evaluate(
        tmp_path, pairs, reference=models["reference"], guide=models["guide"], model=f"megatron={checkpoint}"
    )
    metrics = json.loads(out.read_text())["models"]
    assert alike({**metrics["megatron"], "directory": ""}, {**metrics["guide"], "directory": ""})
    before = fingerprint(checkpoint)
    assert fingerprint(checkpoint) == before
    next(checkpoint.glob("*.distcp")).touch()
    assert fingerprint(checkpoint) != before
    with pytest.raises(UserError, match=r"--scratch .*: no such directory"), hf_directory(checkpoint, tmp_path / "no"):
        pass


def test_bad_input_is_one_line(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "w5", "chosen": " w6"}\n')
    other = make_llama(tmp_path / "other", layers=2, vocab_size=40)
    (tmp_path / "file").touch()
    reference = models["reference"]
    cases = [
        ({"reference": reference, "guide": other}, f"guide {other} has another tokenizer than the reference"),
        ({"reference": reference}, "nothing to compare"),
        ({"reference": reference, "guide": models["guide"]}, f"{pairs}:1: key 'rejected' is missing"),
        ({"reference": reference, "guide": tmp_path}, "neither an HF directory"),
        ({"reference": reference, "guide": models["guide"], "out": tmp_path}, "cannot be written: it is a directory"),
        ({"reference": reference, "guide": models["guide"], "out": tmp_path / "file" / "x"}, "cannot be written"),
    ]
    for options, message in cases:
        status, _ = evaluate(tmp_path, pairs, **options)
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert status == 1
        assert line.startswith("error: ")
        assert message in line
