"""The reference code's YAML becomes the same run here."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_tgdpo.config import config_from_dict, load_config
from megatron_tgdpo.errors import UserError
from tests.launch import run_module
from tools.import_llamafactory_config import convert, not_carried_over
from tools.llamafactory_datasets import dataset_file

# The keys and values of the reference code's Llama-3 8B example.
REFERENCE = {
    "model_name_or_path": "policy", "ref_model": "reference", "tgdpo_reward_model": "guide", "stage": "tgdpo",
    "do_train": True, "finetuning_type": "full", "pref_beta": 0.1, "tgdpo_alpha": 0.5, "pref_loss": "sigmoid",
    "dataset": "name", "template": "llama3", "cutoff_len": 2048, "max_prompt_length": 1800,
    "preprocessing_num_workers": 16, "output_dir": "out", "logging_steps": 1, "save_steps": 60,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "learning_rate": 7.0e-7,
    "num_train_epochs": 1.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True, "eval_steps": 50000,
}  # fmt: skip


def test_the_paper_example() -> None:
    config = config_from_dict(convert(REFERENCE, 8, "pairs.jsonl", None))
    assert (config.model.policy, config.model.reference, config.model.guide) == ("policy", "reference", "guide")
    assert (config.loss.method, config.loss.beta, config.loss.alpha) == ("tgdpo", 0.1, 0.5)
    assert config.batch.global_pairs == 128
    assert (config.data.train, config.data.max_length, config.data.max_prompt_length) == ("pairs.jsonl", 2048, 1800)
    assert (config.optimizer.lr, config.optimizer.schedule, config.optimizer.warmup_ratio) == (7e-7, "cosine", 0.1)
    assert (config.train.epochs, config.train.steps, config.precision.dtype) == (1.0, None, "bf16")
    assert not_carried_over(REFERENCE) == ["do_train", "template"]


def test_other_methods() -> None:
    unguided = {key: value for key, value in REFERENCE.items() if not key.startswith("tgdpo_")}
    dpo = {**unguided, "stage": "dpo", "pref_ftx": 0.25, "dpo_label_smoothing": 0.1}
    loss = config_from_dict(convert(dpo, 8, "pairs.jsonl", None)).loss
    assert (loss.method, loss.options) == ("dpo", {"beta": 0.1, "label_smoothing": 0.1, "sft_weight": 0.25})
    simpo = {**unguided, "stage": "dpo", "pref_loss": "simpo", "pref_beta": 2.5, "simpo_gamma": 1.4, "pref_ftx": 0}
    del simpo["ref_model"]
    loss = config_from_dict(convert(simpo, 8, "pairs.jsonl", None)).loss
    assert (loss.method, loss.options) == ("simpo", {"beta": 2.5, "gamma": 1.4})
    with pytest.raises(UserError, match=r"loss\.sft_weight is set but loss\.method tgdpo does not use it"):
        config_from_dict(convert({**REFERENCE, "pref_ftx": 0.1}, 8, "pairs.jsonl", None))


@pytest.mark.parametrize(("key", "value"), [("pref_loss", "ipo"), ("finetuning_type", "lora"), ("fp16", True)])
def test_what_would_change_the_maths_is_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=key):
        convert({**REFERENCE, key: value}, 8, "pairs.jsonl", None)


def test_command(tmp_path: Path) -> None:
    (tmp_path / "reference.yaml").write_text(yaml.safe_dump(REFERENCE))
    arguments = [str(tmp_path / "reference.yaml"), "--ranks", "8", "--train", "pairs.jsonl"]
    done = run_module("tools.import_llamafactory_config", [*arguments, "--out", str(tmp_path / "ours.yaml")])
    assert "template" in done.stdout
    assert load_config(tmp_path / "ours.yaml").batch.global_pairs == 128


ENTRY = {
    "file_name": "pairs.json",
    "ranking": True,
    "formatting": "sharegpt",
    "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    "tags": {"role_tag": "from", "content_tag": "value"},
}


def info(tmp_path: Path, **changes: object) -> Path:
    entry = {key: value for key, value in {**ENTRY, **changes}.items() if value is not None}
    (tmp_path / "pairs.json").write_text("[]")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"name": entry}))
    return tmp_path / "dataset_info.json"


def test_dataset_names_are_looked_up(tmp_path: Path) -> None:
    info(tmp_path)
    (tmp_path / "reference.yaml").write_text(yaml.safe_dump({**REFERENCE, "eval_dataset": "name"}))
    arguments = [
        str(tmp_path / "reference.yaml"),
        "--ranks",
        "8",
        "--dataset-info",
        str(tmp_path / "dataset_info.json"),
    ]
    run_module("tools.import_llamafactory_config", [*arguments, "--out", str(tmp_path / "ours.yaml")])
    data = load_config(tmp_path / "ours.yaml").data
    assert data.train == data.validation == str(tmp_path / "pairs.json")


def test_the_plain_form_is_taken(tmp_path: Path) -> None:
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    file = info(tmp_path, formatting=None, tags=None, columns=columns)
    assert dataset_file(file, "name") == str(tmp_path / "pairs.json")


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({}, "other", "no entry 'other'"),
        ({}, "name,other", "several datasets"),
        ({"file_name": None, "hf_hub_url": "a/b"}, "name", "hf_hub_url is not downloaded here"),
        ({"file_name": "nowhere.json"}, "name", "nowhere.json is not a file"),
        ({"ranking": None}, "name", "not a file of preference pairs"),
        ({"num_samples": 10}, "name", "num_samples has no counterpart"),
        ({"formatting": "openai"}, "name", "formatting 'openai'"),
        (
            {"columns": {"messages": "turns"}},
            "name",
            "columns.messages is 'turns', which must be called 'conversations'",
        ),
        ({"columns": {"images": "images"}}, "name", "columns.images is 'images', which has no counterpart"),
        ({"tags": {"role_tag": "speaker"}}, "name", "tags.role_tag is 'speaker', here only from, role"),
    ],
)
def test_what_has_no_counterpart_is_refused(tmp_path: Path, changes: dict, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataset_file(info(tmp_path, **changes), name)
