"""The config that the quickstart writes for someone's own model and pairs."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_tgdpo.config.loading import load_config
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from tests.tiny_models import make_llama
from tools.examples.quickstart import own_model


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(25)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_tenth_is_held_out(pairs: Path) -> None:
    train, validation = own_model.split(pairs)
    assert (len(train), len(validation)) == (22, 3)
    assert sorted(record["prompt"] for record in train + validation) == sorted(f"p{n}" for n in range(25))
    assert own_model.split(pairs) == (train, validation)
    pairs.write_text(pairs.read_text().splitlines()[0])
    with pytest.raises(UserError, match="two are needed"):
        own_model.split(pairs)


def test_what_it_writes_is_a_config(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = make_llama(tmp_path / "model"), tmp_path / "out"
    assert own_model.main(["--model", str(model), "--pairs", str(pairs), "--out", str(out)]) == 0
    assert capsys.readouterr().out == "1\n"
    config = load_config(out / "tgdpo.yaml")
    assert config.model.policy == str(model)
    assert (config.guide.method, config.loss.method, config.train.steps) == ("dpo", "tgdpo", 6)
    assert Path(config.output_dir).parent == out
    written = yaml.safe_load((out / "tgdpo.yaml").read_text())
    for name, count in (("train", 22), ("validation", 3)):
        assert len(Path(written["data"][name]).read_text().splitlines()) == count


def test_a_model_that_this_machine_cannot_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_config = read_hf_config(make_llama(tmp_path / "model"))
    monkeypatch.setattr(own_model, "parameter_count", lambda config: 10**15)
    monkeypatch.setattr(own_model.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="take a smaller model, or a machine with GPUs"):
        own_model.settings(hf_config, "big", tmp_path, 10)


def test_on_gpus_the_planner_chooses_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_config = read_hf_config(make_llama(tmp_path / "model"))
    monkeypatch.setattr(own_model.torch.cuda, "device_count", lambda: 2)

    class Properties:
        total_memory = 80 << 30

    monkeypatch.setattr(own_model.torch.cuda, "get_device_properties", lambda index: Properties())
    values, ranks = own_model.settings(hf_config, "model", tmp_path, 1000)
    assert ranks == 2
    assert values["precision"] == {"dtype": "bf16"}
    assert values["train"]["steps"] == 31
    assert ranks % (values["parallel"]["tensor"] * values["parallel"]["pipeline"]) == 0
