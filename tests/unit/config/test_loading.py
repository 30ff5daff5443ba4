"""Configuration: strict keys and types, overrides, round trip, contradictions."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tgdpo.config.loading import config_from_dict, load_config, to_dict, to_yaml
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.errors import UserError

EPOCHS = ("train.steps=null", "train.epochs=1.5")
VALID: dict[str, Any] = {
    "model": {"policy": "policy", "guide": "guide"},
    "data": {"train": "pairs.jsonl"},
    "batch": {"global_pairs": 8},
    "optimizer": {"lr": 1e-6},
    "train": {"steps": 10},
    "output_dir": "out",
}


def write(tmp_path: Path, values: dict[str, Any]) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_file_defaults_and_overrides(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, VALID), ["loss.alpha=0.25", "parallel.tensor=2", *EPOCHS])
    assert config.loss.alpha == 0.25
    assert config.parallel.tensor == 2
    assert config.train.epochs == 1.5
    assert config.train.steps is None
    assert config.loss.beta == 0.1  # the paper's default
    assert config.reference_path == "policy"
    assert config.seq_length == 2 * config.data.max_length


def test_the_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config = config_from_dict(VALID)
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "saved.yaml") == config
    assert config_from_dict(to_dict(config)) == config


def test_config_cannot_be_changed() -> None:
    config = config_from_dict(VALID)
    with pytest.raises(AttributeError):
        config.loss.beta = 1.0  # type: ignore[misc]
    assert isinstance(config, Config)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss.betta=1", "loss.betta"),
        ("losss.beta=1", "losss"),
        ("loss.beta=high", "loss.beta"),
        ("loss.beta=-1", "loss.beta"),
        ("loss.method=kto", "tgdpo, dpo, simpo, orpo, sft"),
        ("loss.method=dpo", "model.guide"),
        ("model.guide=null", "model.guide"),
        ("train.epochs=1", "exactly one of train.steps and train.epochs"),
        ("parallel.context=0", "parallel.context"),
        ("loss.select_share=1", "loss.select_share is set but loss.method tgdpo with loss.weights tgdpo does not use"),
        ("loss.alpha=-1", "loss.alpha"),
        ("parallel.virtual_pipeline=2", "parallel.virtual_pipeline is 2 with one stage"),
        ("batch.tokens_per_micro_batch=0", "batch.tokens_per_micro_batch is 0: it must be positive"),
        ("data.max_prompt_length=2048", "data.max_prompt_length"),
        ("optimizer.warmup_ratio=1.5", "optimizer.warmup_ratio"),
        ("guidance.mode=cached", "needs guidance.cache"),
        ("guidance.mode=kv", "colocated, cached"),
        ("no-equals-sign", "section.key=value"),
    ],
)
def test_bad_values_are_refused_in_one_line_that_names_them(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, VALID), [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["model.policy", "data.train", "batch.global_pairs", "optimizer.lr", "output_dir"])
def test_required_keys(tmp_path: Path, missing: str) -> None:
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in VALID.items()}
    section, _, key = missing.partition(".")
    if key:
        del values[section][key]
    else:
        del values[section]
    with pytest.raises(UserError, match=missing):
        load_config(write(tmp_path, values))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"bad\.yaml:1: not valid YAML"):
        load_config(tmp_path / "bad.yaml")


def test_rows_divide_under_sequence_parallelism(tmp_path: Path) -> None:
    overrides = ["parallel.tensor=2", "parallel.sequence_parallel=true", "batch.tokens_per_micro_batch=4097"]
    with pytest.raises(UserError, match="4097 is not divisible"):
        load_config(write(tmp_path, VALID), overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel.context=2", "batch.tokens_per_micro_batch=4098"], "not divisible by 2 x parallel.context = 2 x 2"),
        (["loss.method=simpo"], "loss.method simpo uses no guide"),
        (["loss.method=sft", "model.guide=null", "loss.beta=0.1"], "loss.beta is set but loss.method sft"),
        (["loss.method=simpo", "model.guide=null", "model.reference=x"], "simpo uses no reference"),
        (["loss.method=dpo", "model.guide=null", "loss.label_smoothing=0.5"], "loss.label_smoothing is 0.5"),
        (
            ["loss.method=simpo", "model.guide=null", "guidance.mode=cached", "guidance.cache=x"],
            "no frozen models whose log-probs a cache could hold",
        ),
    ],
)
def test_combinations_that_make_no_sense_are_refused(tmp_path: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_config(write(tmp_path, VALID), overrides)


def test_dpo_without_a_reference_has_none(tmp_path: Path) -> None:
    free = ["loss.method=dpo", "model.guide=null", "loss.reference_free=true"]
    config = load_config(write(tmp_path, VALID), free)
    assert config.method.frozen == ()
    assert list(config.model_paths) == ["policy"]
    assert "logps/reference_" in config.method.without
    guided = load_config(write(tmp_path, VALID), ["loss.reference_free=true"])
    assert guided.method.frozen == ("reference", "guide")


def test_options_take_the_defaults_of_their_method(tmp_path: Path) -> None:
    path = write(tmp_path, VALID)
    dpo = {"beta": 0.1, "form": "sigmoid", "reference_free": False, "label_smoothing": 0.0, "sft_weight": 0.0}
    tgdpo = {**dpo, "gamma": 0.0, "guide_beta": None, "weights": "tgdpo"}
    assert load_config(path).loss.options == {**tgdpo, "alpha": 0.5}
    sepo = load_config(path, ["loss.weights=sepo"]).loss
    assert sepo.options == {**tgdpo, "weights": "sepo", "select_share": 0.3}
    assert sepo.alpha is None
    simpo = load_config(path, ["loss.method=simpo", "model.guide=null", "loss.gamma=0.3"])
    assert simpo.loss.options == {"beta": 2.0, "gamma": 0.3}
    assert simpo.loss.alpha is None
    assert load_config(path, ["parallel.context=2"]).shared_prompts is True
    assert load_config(path).shared_prompts is True
