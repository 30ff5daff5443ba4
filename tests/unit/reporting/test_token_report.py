"""The command: from a config, its data and models to the page; and what it says of bad input."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_tgdpo.config.loading import load_config
from megatron_tgdpo.data.dataset import PreferencePair
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.guidance.cache import Shards, guidance_key, write_manifest, write_shard
from tests.tiny_models import make_llama
from tgdpo.report import main
from tgdpo.reporting.hf_logps import response_logps
from tgdpo.reporting.sources import cached_logps, check_finite, model_logps, open_cache, open_split

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two models, pairs, and a config."""
    directory = tmp_path_factory.mktemp("report")
    for seed, name in enumerate(("reference", "guide")):
        make_llama(directory / name, layers=2, seed=seed)
    records = [
        {"prompt": f"w{k} w5", "chosen": f"w6 w{k + 7} w8", "rejected": f"w9 w{k + 9} w4 w3"} for k in range(3, 8)
    ]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {
        "model": {"policy": str(directory / "reference"), "guide": str(directory / "guide")},
        "data": {"train": str(directory / "pairs.jsonl"), "max_length": 32, "workers": 1},
        "batch": {"global_pairs": 2},
        "optimizer": {"lr": 1e-4},
        "precision": {"dtype": "fp32"},
        "train": {"steps": 1},
        "output_dir": str(directory / "run"),
    }
    (directory / "config.yaml").write_text(json.dumps(config))
    return directory


def test_writes_the_page_and_says_the_metrics(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "report.html"
    policy = ["--policy", str(run / "guide")]
    assert main([str(run / "config.yaml"), "loss.alpha=0.25", "--out", str(out), "--pairs", "4", *policy]) == 0
    output = capsys.readouterr()
    printed = output.out
    assert "Too few pairs to tell" in output.err
    assert "4 pairs" in printed
    assert f"guide            {run / 'guide'}" in printed
    assert "alpha 0.25, beta 0.1" in printed
    html = out.read_text()
    assert "w6" in html
    assert "4 of 5" in html
    for fact in ("reference", "guide", "pairs.jsonl"):
        assert f"<dd>{run / fact}</dd>" in html


def test_the_guide_s_own_beta_and_other_forms_are_on_the_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "form.html"
    options = ["loss.guide_beta=0.4", "loss.form=ipo"]
    assert main([str(run / "config.yaml"), *options, "--out", str(out)]) == 0
    assert "alpha 0.5, beta 0.1, guide_beta 0.4" in capsys.readouterr().out
    assert re.search(r'"guide_beta": ?0.4, ?"guides": ?\[.*"plain_loss": ?false', out.read_text())


def test_selected_tokens_are_those_of_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of three or four response tokens and an end, a share of 0.5 is two."""
    out = run / "sepo.html"
    assert main([str(run / "config.yaml"), "loss.weights=sepo", "loss.select_share=0.5", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "5 pairs, 45 response tokens, beta 0.1\n" in printed
    assert "token weights  1 on 20 of 45 tokens (44.4%), 0 on the others" in printed
    assert "alpha" not in printed


def test_guides_are_shown_side_by_side(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "two.html"
    guides = ["--guide", str(run / "guide"), "--guide", str(run / "reference")]
    assert main([str(run / "config.yaml"), "--out", str(out), *guides]) == 0
    output = capsys.readouterr()
    assert f"guide 1          {run / 'guide'}" in output.out
    assert f"guide 2          {run / 'reference'}" in output.out
    assert output.out.count("accuracy ") == 2
    assert "WARNING: guide 2: GUIDE IS THE REFERENCE: all 5 pairs" in output.err
    assert f"<dt>guide 2</dt><dd>{run / 'reference'}</dd>" in out.read_text()


def test_a_cache_gives_the_page_that_its_models_give(run: Path) -> None:
    config = load_config(run / "config.yaml")
    dataset = open_split(config, "train")
    pairs = [dataset[index] for index in range(len(dataset))]
    models = {"reference": str(run / "reference"), "guide": str(run / "guide")}
    values = {
        name: np.concatenate(arrays) for name, arrays in model_logps(models, pairs, torch.float32, CPU, {}).items()
    }
    key, shards = guidance_key(config, dataset, ("a", "b")), Shards(dataset.lengths, 8)
    cache = run / "cache" / "train"
    cache.mkdir(parents=True)
    write_shard(cache, 0, key, values)
    write_manifest(cache, key, shards)
    for name, source in (("cached", ["--cache", str(run / "cache")]), ("models", [])):
        assert main([str(run / "config.yaml"), "--out", str(run / f"{name}.html"), *source]) == 0
    cached, computed = ((run / f"{name}.html").read_text() for name in ("cached", "models"))
    data = [text.split('id="data">')[1].split("</script>")[0] for text in (cached, computed)]
    assert data[0] == data[1]
    assert str(run / "cache") in cached
    assert f"<dd>{run / 'guide'}</dd>" in cached
    # A cache of other data is refused.
    other = replace(key, data="other")
    write_shard(cache, 0, other, values)
    write_manifest(cache, other, shards)
    with pytest.raises(UserError, match="made for another data"):
        open_cache(load_config(run / "config.yaml", [f"guidance.cache={run / 'cache'}"]), "train", dataset)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{run}/nowhere/report.html"], "no directory, or is read-only"),
        (["--out", "{run}"], "is a directory"),
        (["--out", "{run}/x.html", "model.guide=null", "loss.method=dpo"], "loss.method dpo has no token weights"),
        (["--out", "{run}/x.html", "--split", "validation"], "data.validation is not set"),
        (["--out", "{run}/x.html", "--guide", "{run}/none"], "--guide {run}/none: no such directory"),
        (["--out", "{run}/x.html", "data.tokenizer={run}/none"], "no tokenizer at"),
    ],
)
def test_bad_input_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    filled = [argument.format(run=run) for argument in arguments]
    assert main([str(run / "config.yaml"), *filled]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message.format(run=run) in error
    assert not (run / "x.html").exists()


def pair(index: int = 0) -> PreferencePair:
    return PreferencePair(np.array([5, 6, 7]), np.array([8, 9, 2]), np.array([10, 11, 12, 13, 2]), index)


def test_log_probs_are_those_of_each_response_alone(run: Path) -> None:
    (found,) = response_logps(run / "guide", [pair()], torch.float32, CPU)
    model = AutoModelForCausalLM.from_pretrained(run / "guide", dtype=torch.float32)
    expected = []
    for response in (pair().chosen, pair().rejected):
        ids = torch.from_numpy(np.concatenate([pair().prompt, response]))
        with torch.no_grad():
            logps = model(ids[None]).logits[0].log_softmax(-1)
        expected += [float(logps[place - 1, ids[place]]) for place in range(3, len(ids))]
    assert found == pytest.approx(expected, abs=2e-5)


def test_a_vocabulary_that_is_too_small_is_refused(run: Path) -> None:
    large = PreferencePair(np.array([5]), np.array([500]), np.array([6]), 0)
    with pytest.raises(UserError, match=r"vocabulary of 131, the data holds token id 500"):
        response_logps(run / "guide", [large], torch.float32, CPU)


class FixedCache:
    """Answers as a guidance cache does."""

    def __init__(self, reference: Sequence[float], guide: Sequence[float] | None) -> None:
        self.reference, self.guide = reference, guide

    def logps(self, pair_index: int) -> tuple[np.ndarray, np.ndarray | None]:
        return np.array(self.reference), None if self.guide is None else np.array(self.guide)


def test_log_probs_from_a_cache() -> None:
    guide = [-float(k) for k in range(8)]
    place = ["pairs.jsonl:17"]
    found = cached_logps(FixedCache([-1.0] * 8, guide), "cache", [pair()], place)
    assert found["guide"][0].tolist() == guide
    assert found["reference"][0].dtype == np.float32
    with pytest.raises(UserError, match="cache: holds the reference alone"):
        cached_logps(FixedCache([-1.0] * 8, None), "cache", [pair()], place)
    with pytest.raises(UserError, match=r"holds 7 response tokens for pairs\.jsonl:17, the data has 8"):
        cached_logps(FixedCache([-1.0] * 7, [-1.0] * 7), "cache", [pair()], place)
    with pytest.raises(UserError, match=r"pairs\.jsonl:17: the guide gives it a log-prob that is not finite"):
        check_finite({"guide": [np.array([np.nan])]}, place)
