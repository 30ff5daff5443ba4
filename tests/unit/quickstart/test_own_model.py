"""The config that the quickstart writes for someone's own model and pairs."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_tgdpo.config.loading import load_config
from megatron_tgdpo.data.tokenizers import load_tokenizer
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from tests.tiny_models import make_llama
from tools.examples.quickstart import own_model

PAIRS = own_model.Pairs([{}] * 1000, [{}] * 10, 2048, 3000.0)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"w{n}", "chosen": "w3 w4", "rejected": "w5"} for n in range(3, 28)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("own_model") / "model")


def test_pairs_that_need_not_be_cut_are_taken(pairs: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(str(model))
    size = own_model.Size((64, 128), 1000, 2)
    found = own_model.split(pairs, tokenizer, size)
    assert (len(found.train), len(found.validation), found.length) == (23, 2, 64)
    assert sorted(record["prompt"] for record in found.train + found.validation) == sorted(
        f"w{n}" for n in range(3, 28)
    )
    assert own_model.split(pairs, tokenizer, size) == found
    capsys.readouterr()
    records = [json.loads(line) for line in pairs.read_text().splitlines()]
    long = [{**record, "chosen": "w6 w7 " * 60} if number < 15 else record for number, record in enumerate(records)]
    long[15] |= {"chosen": "w8", "rejected": "w8"}
    pairs.write_text("".join(json.dumps(record) + "\n" for record in long))
    for lengths, enough, expected in (((64, 1024), 9, (9, 64)), ((64, 1024), 10, (24, 1024)), ((64, 65), 10, (9, 65))):
        found = own_model.split(pairs, tokenizer, own_model.Size(lengths, enough, 2))
        assert (len(found.train) + len(found.validation), found.length) == expected
    assert "9 of 25 pairs are used, those of at most 65 tokens: 1 held out" in capsys.readouterr().err
    pairs.write_text(pairs.read_text().splitlines()[0])
    with pytest.raises(UserError, match="two are needed"):
        own_model.split(pairs, tokenizer, size)


def test_what_it_writes_is_a_config(
    pairs: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert own_model.main(["--model", str(model), "--pairs", str(pairs), "--out", str(out)]) == 0
    assert capsys.readouterr().out == "1\n"
    config = load_config(out / "tgdpo.yaml")
    assert config.model.policy == str(model)
    assert (config.guide.method, config.loss.method, config.train.steps) == ("dpo", "tgdpo", 11)
    assert Path(config.output_dir).parent == out
    written = yaml.safe_load((out / "tgdpo.yaml").read_text())
    for name, count in (("train", 22), ("validation", 3)):
        assert len(Path(written["data"][name]).read_text().splitlines()) == count


def test_steps_are_what_a_cpu_makes_in_minutes(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hf_config = read_hf_config(model)
    monkeypatch.setattr(own_model.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(own_model.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    steps = []
    for parameters in (10**6, 134_515_008, 500_000_000):
        monkeypatch.setattr(own_model, "parameter_count", lambda config, count=parameters: count)
        values, _ = own_model.settings(hf_config, "m", tmp_path, own_model.Pairs([{}] * 90, [{}] * 8, 512, 600.0))
        steps.append(values["train"]["steps"])
        assert values["optimizer"]["warmup_ratio"] == 0
    # 120 s of 2 cores at 60 GFLOP/s; a step of SmolLM2 is 10 x 134.5e6 x 2 x 600 operations, 13.5 s.
    assert steps == [45, 9, 4]


def test_a_model_that_this_machine_cannot_train(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_config = read_hf_config(model)
    monkeypatch.setattr(own_model, "parameter_count", lambda config: 10**15)
    monkeypatch.setattr(own_model.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="take a smaller model, or a machine with GPUs"):
        own_model.settings(hf_config, "big", tmp_path, PAIRS)


def test_on_gpus_the_planner_chooses_the_layout(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_config = read_hf_config(model)
    monkeypatch.setattr(own_model.torch.cuda, "device_count", lambda: 2)

    class Properties:
        total_memory = 80 << 30

    monkeypatch.setattr(own_model.torch.cuda, "get_device_properties", lambda index: Properties())
    values, ranks = own_model.settings(hf_config, "model", tmp_path, PAIRS)
    assert ranks == 2
    assert values["precision"] == {"dtype": "bf16"}
    assert values["train"]["steps"] == 31
    assert ranks % (values["parallel"]["tensor"] * values["parallel"]["pipeline"]) == 0
