"""The reference code's YAML becomes the same run here."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import yaml

from megatron_tgdpo.checkpoints.adapter_directory import Lora
from megatron_tgdpo.config.loading import config_from_dict, load_config
from megatron_tgdpo.config.schema import Config, LoraConfig
from megatron_tgdpo.data.chat import ChatTemplate
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.layouts import detect_layout, parse_record, rename
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.setup.learning_rate import build_scheduler
from megatron_tgdpo.setup.model_sources import trained_lora
from megatron_tgdpo.storage.yaml_text import read_yaml
from tests.launch import run_module
from tests.published_configs import PUBLISHED
from tests.unit.config.test_loading import VALID
from tgdpo.import_config import main
from tgdpo.llamafactory.conversion import convert, not_carried_over
from tgdpo.llamafactory.datasets import dataset_files
from tgdpo.llamafactory.keys import HARMLESS, ONLY, READ
from tgdpo.llamafactory.templates import NAMES, chat_template

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
    assert (config.data.train, config.data.max_length, config.data.max_prompt_length) == ("pairs.jsonl", 2048, None)
    assert (config.optimizer.lr, config.optimizer.schedule, config.optimizer.warmup_ratio) == (7e-7, "cosine", 0.1)
    assert (config.train.epochs, config.train.steps, config.precision.dtype) == (1.0, None, "bf16")
    assert not_carried_over({**REFERENCE, "plot_loss": True, "lora_rank": 8}) == ["lora_rank", "plot_loss"]
    asked = config_from_dict(convert(REFERENCE, 8, "pairs.jsonl", None, max_prompt_length=True))
    assert asked.data.max_prompt_length == 1800


def test_other_methods() -> None:
    unguided = {key: value for key, value in REFERENCE.items() if not key.startswith("tgdpo_")}
    dpo = {**unguided, "stage": "dpo", "pref_ftx": 0.25, "dpo_label_smoothing": 0.1}
    loss = config_from_dict(convert(dpo, 8, "pairs.jsonl", None)).loss
    assert (loss.method, loss.form, loss.beta, loss.label_smoothing, loss.sft_weight) == (
        "dpo",
        "sigmoid",
        0.1,
        0.1,
        0.25,
    )
    simpo = {**unguided, "stage": "dpo", "pref_loss": "simpo", "pref_beta": 2.5, "simpo_gamma": 1.4, "pref_ftx": 0}
    del simpo["ref_model"]
    loss = config_from_dict(convert(simpo, 8, "pairs.jsonl", None)).loss
    assert (loss.method, loss.options) == ("simpo", {"beta": 2.5, "gamma": 1.4})
    orpo = {**unguided, "stage": "dpo", "pref_loss": "orpo", "pref_beta": 0.2}
    del orpo["ref_model"]
    loss = config_from_dict(convert(orpo, 8, "pairs.jsonl", None)).loss
    assert (loss.method, loss.options) == ("orpo", {"beta": 0.2})


@pytest.mark.parametrize("form", ["hinge", "ipo"])
def test_forms_of_dpo(form: str) -> None:
    unguided = {key: value for key, value in REFERENCE.items() if not key.startswith("tgdpo_")}
    loss = config_from_dict(convert({**unguided, "stage": "dpo", "pref_loss": form}, 8, "pairs.jsonl", None)).loss
    assert (loss.method, loss.form, loss.beta) == ("dpo", form, 0.1)
    smoothed = convert({**unguided, "stage": "dpo", "pref_loss": form, "dpo_label_smoothing": 0.1}, 8, "p", None)
    with pytest.raises(UserError, match=f"loss.label_smoothing is 0.1 but loss.form {form} does not use it"):
        config_from_dict(smoothed)


@pytest.mark.parametrize(
    ("key", "value"), [("pref_ftx", 0.1), ("dpo_label_smoothing", 0.1), ("pref_loss", "ipo"), ("pref_loss", "orpo")]
)
def test_what_the_authors_tgdpo_makes_something_else_of(key: str, value: object) -> None:
    reference = {**REFERENCE, key: value}
    with pytest.raises(UserError, match=f"{key}: {value} with stage: tgdpo is not carried over"):
        convert(reference, 8, "pairs.jsonl", None)
    assert convert(reference, 8, "pairs.jsonl", None, ignore=[key]) == convert(REFERENCE, 8, "pairs.jsonl", None)


@pytest.mark.parametrize(("key", "value"), [("pref_loss", "kto_pair"), ("finetuning_type", "oft"), ("fp16", True)])
def test_what_would_change_the_maths_is_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=key):
        convert({**REFERENCE, key: value}, 8, "pairs.jsonl", None)


# A value that is refused, and a part of what is said.
REFUSED = {
    "max_samples": (1000, "take that many records from the beginning"),
    "val_size": (0.1, "--validation"),
    "optim": ("sgd", "always AdamW"),
    "streaming": (True, ""),
    "mix_strategy": ("interleave_under", ""),
    "quantization_bit": (4, "not quantised"),
    "adapter_name_or_path": ("a", "merge the adapter"),
    "ref_model_adapters": ("a", "merge the adapter"),
    "use_galore": (True, ""),
    "neftune_noise_alpha": (5, ""),
    "rope_scaling": ("linear", "config.json"),
    "pref_bco_weight": (0.1, ""),
    "ld_alpha": (0.5, ""),
    "pure_bf16": (True, "set bf16"),
    "ignore_pad_token_for_loss": (False, ""),
    "do_train": (False, ""),
    "learning_rte": (1, "not a key that is known"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_carried_is_refused_unless_it_is_to_be_ignored(key: str) -> None:
    value, said = REFUSED[key]
    reference = {**REFERENCE, key: value}
    with pytest.raises(UserError) as caught:
        convert(reference, 8, "pairs.jsonl", None)
    assert f"{key}" in str(caught.value)
    assert said in str(caught.value)
    assert "--ignore KEY" in str(caught.value)
    assert convert(reference, 8, "p", None, ignore=[key]) == convert(REFERENCE, 8, "p", None)


def test_all_refused_keys_are_named_at_once_with_their_lines() -> None:
    text = yaml.safe_dump({**REFERENCE, **{key: value for key, (value, _) in REFUSED.items()}}, sort_keys=True)
    lines = [line.split(":")[0] for line in text.splitlines()]
    with pytest.raises(UserError) as caught:
        convert(read_yaml(text, "lf.yaml"), 8, "pairs.jsonl", None, source="lf.yaml")
    assert all(f" in line {lines.index(key) + 1}" in str(caught.value) for key in REFUSED)
    assert "\n" not in str(caught.value)


def test_values_that_change_nothing_are_taken() -> None:
    text = "optim: adamw_torch\nval_size: 0.0\nstreaming: off\npacking: false\nrope_scaling:\nmax_samples: null\n"
    reference = {**read_yaml(yaml.safe_dump(REFERENCE), "a"), **read_yaml(text, "b")}
    assert convert(reference, 8, "p", None) == convert(REFERENCE, 8, "p", None)


def test_a_key_is_of_one_kind() -> None:
    assert not set(READ) & set(ONLY)
    assert not set(READ) & HARMLESS
    assert not set(ONLY) & HARMLESS


def test_the_reference_code_s_defaults() -> None:
    needed = {"model_name_or_path": "policy", "output_dir": "out", "stage": "dpo", "finetuning_type": "full"}
    config = config_from_dict(convert(needed, 4, "p", None))
    assert (config.optimizer.lr, config.optimizer.schedule, config.optimizer.warmup_ratio) == (5e-5, "linear", 0.0)
    assert (config.batch.global_pairs, config.train.epochs, config.train.seed) == (32, 3.0, 42)
    assert (config.precision.dtype, config.loss.options["beta"], config.data.max_length) == ("fp32", 0.1, 2048)
    without = {name: value for name, value in needed.items() if name != "stage"}
    with pytest.raises(UserError, match=r"stage: sft is not carried over.*the reference code's default"):
        convert(without, 4, "p", None)
    del needed["finetuning_type"]
    lora = config_from_dict(convert(needed, 4, "p", None)).lora
    assert trained_lora_of(lora) == Lora(8, 16.0)
    assert not config_from_dict(convert(needed, 4, "p", None, ignore=["finetuning_type"])).lora.trains


LORA = {**REFERENCE, "finetuning_type": "lora"}
del LORA["ref_model"]


def trained_lora_of(lora: LoraConfig) -> Lora | None:
    return trained_lora(config_from_dict({**VALID, "lora": dataclasses.asdict(lora)}))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"lora_rank": 64}, Lora(64, 128.0)),
        ({"lora_rank": 4, "lora_alpha": 4, "use_rslora": True, "lora_dropout": 0.0}, Lora(4, 4.0, rslora=True)),
        ({"lora_alpha": 0, "lora_target": "all"}, Lora(8, 16.0)),  # 0 is the default there
        ({"lora_target": "v_proj, q_proj", "pissa_iter": 4}, Lora(8, 16.0, ("q_proj", "v_proj"))),
    ],
)
def test_an_adapter_trains(changes: dict, wanted: Lora) -> None:
    config = config_from_dict(convert({**LORA, **changes}, 8, "p", None))
    assert trained_lora_of(config.lora) == wanted
    assert (config.model.reference, config.train.check_start) == (None, True)
    assert not_carried_over({**LORA, "lora_rank": 8, "pissa_iter": 16}) == ["pissa_iter"]


def test_an_adapter_that_goes_on_has_the_base_as_its_reference() -> None:
    config = config_from_dict(convert({**LORA, "adapter_name_or_path": "sft", "lora_rank": 4}, 8, "p", None))
    assert config.lora == LoraConfig(adapter="sft")
    assert (config.model.policy, config.model.reference, config.train.check_start) == ("policy", "policy", False)
    own = {**LORA, "adapter_name_or_path": "sft", "ref_model": "reference"}
    config = config_from_dict(convert(own, 8, "p", None))
    assert (config.model.reference, config.train.check_start) == ("reference", True)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lora_dropout", 0.05, "adapters have no dropout here"),
        ("use_dora", True, "only plain LoRA is"),
        ("pissa_init", True, "it changes the base model"),
        ("loraplus_lr_ratio", 16.0, "one learning rate"),
        ("additional_target", "embed_tokens", "only linears"),
        ("create_new_adapter", True, "merge adapter_name_or_path"),
        ("quantization_bit", 4, "not quantised"),
        ("lora_bias", "all", "not a key that is known"),
        ("lora_target", "q_proj,W_pack", "lora_target: W_pack has no adapter here"),
        ("adapter_name_or_path", "a,b", "names several"),
        ("lora_rank", 0, r"lora.rank is 0"),
    ],
)
def test_what_is_no_plain_adapter_is_refused(key: str, value: object, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        config_from_dict(convert({**LORA, key: value}, 8, "p", None))
    assert "\n" not in str(caught.value)
    if key not in ("quantization_bit", "adapter_name_or_path"):
        # Options of what is not used.
        convert({**LORA, key: value, "finetuning_type": "full"}, 8, "p", None)


def test_null_is_the_default_or_what_it_means_there() -> None:
    nulls = dict.fromkeys(("pref_beta", "warmup_ratio", "weight_decay", "ref_model", "eval_steps", "save_steps"))
    reference = {**REFERENCE, **nulls, "save_total_limit": None, "max_grad_norm": None}
    config = config_from_dict(convert(reference, 8, "p", None))
    assert (config.checkpoint.keep, config.optimizer.clip_grad) == (0, 0.0)
    assert (config.optimizer.warmup_ratio, config.model.reference, config.eval.every_steps) == (0.0, None, None)


@pytest.mark.parametrize(
    ("changes", "ratio"),
    [
        ({"warmup_steps": 0.25}, 0.25),
        ({"warmup_steps": 0}, 0.1),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, 0.0),
        ({"lr_scheduler_type": "constant_with_warmup"}, 0.1),
    ],
)
def test_warm_up(changes: dict, ratio: float) -> None:
    config = config_from_dict(convert({**REFERENCE, **changes}, 8, "p", None))
    assert (config.optimizer.warmup_ratio, config.optimizer.warmup_steps) == (ratio, None)


# As a fraction, 7 of 25 would be 8.
@pytest.mark.parametrize(
    "changes", [{"max_steps": 25}, {"max_steps": -1}, {"lr_scheduler_type": "constant_with_warmup"}]
)
def test_warm_up_in_steps(changes: dict) -> None:
    config = config_from_dict(convert({**REFERENCE, "warmup_steps": 7, **changes}, 8, "p", None))
    assert (config.optimizer.warmup_steps, config.optimizer.warmup_ratio) == (7, 0.0)
    total = config.train.steps or 25
    groups = SimpleNamespace(param_groups=[{"params": []}])
    scheduler = build_scheduler(groups, config.optimizer, total)  # type: ignore[arg-type]
    rates = []
    for _ in range(9):
        rates.append(groups.param_groups[0]["lr"] / config.optimizer.lr)
        scheduler.step(1)
    assert rates[:8] == pytest.approx([step / 7 for step in range(8)])
    assert rates[8] <= 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 1.5}, r"warmup_steps: 1\.5 is not a number of steps"),
        ({"warmup_steps": -1}, "warmup_steps: -1 is not a number of steps"),
        ({"warmup_steps": 100, "max_steps": 50}, "warmup_steps: 100 is not a number of steps below max_steps: 50"),
        ({"per_device_train_batch_size": "two"}, "per_device_train_batch_size is 'two': it must be a whole number"),
        ({"eval_steps": 0.1}, r"eval_steps is '0\.1': it must be a whole number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan: it must be a finite number"),
        ({"output_dir": "${x}"}, "write the values out"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type: polynomial is not supported here"),
    ],
)
def test_values_that_make_no_sense_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert({**REFERENCE, **changes}, 8, "p", None)


TALK = [Message("user", "U1"), Message("assistant", "A1"), Message("user", "U2"), Message("assistant", "A2")]
# As src/llamafactory/data/template.py of the authors' code puts its pieces together.
RENDERED = {
    "llama3": "<b><|start_header_id|>user<|end_header_id|>\n\nU1<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
    "\n\nA1<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU2<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\nA2<|eot_id|>",
    "chatml": "<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nU2<|im_end|>\n"
    "<|im_start|>assistant\nA2<|im_end|>",
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>"
    "assistant\nA1<|im_end|>\n<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>",
    "gemma": "<b><start_of_turn>user\nU1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n<start_of_turn>user\nU2"
    "<end_of_turn>\n<start_of_turn>model\nA2<e>",
}


@pytest.mark.parametrize("name", NAMES)
def test_templates_write_what_the_reference_code_writes(name: str) -> None:
    template = ChatTemplate(chat_template(name).removesuffix("\n"), {"bos_token": "<b>", "eos_token": "<e>"}, name)
    assert template.render(TALK, "a talk") == RENDERED[name]
    prompt = template.render(TALK[:3], "a talk", add_generation_prompt=True)
    assert RENDERED[name] == prompt + RENDERED[name].removeprefix(prompt)
    assert RENDERED[name].removeprefix(prompt).startswith("A2<")
    with_system = template.render([Message("system", "S"), *TALK], "a talk")
    assert with_system.count("S") == 1
    assert "helpful" not in with_system
    assert with_system.endswith(RENDERED[name][RENDERED[name].index("U1") :])


def imported(tmp_path: Path, reference: dict, *options: str) -> Config | None:
    """The config that was written; None where the command refused."""
    (tmp_path / "reference.yaml").write_text(yaml.safe_dump(reference))
    arguments = [str(tmp_path / "reference.yaml"), "--train", "pairs.jsonl", "--out", str(tmp_path / "ours.yaml")]
    if main([*arguments, *options]):
        return None
    return load_config(tmp_path / "ours.yaml")


def test_the_layout_is_the_planner_s_and_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(PUBLISHED["Llama-3-8B"]))
    roles = ("model_name_or_path", "ref_model", "tgdpo_reward_model")
    reference = {**REFERENCE, **dict.fromkeys(roles, str(tmp_path / "model"))}
    config = imported(tmp_path, reference, "--ranks", "8")
    assert config is not None
    assert (config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence_parallel) == (2, 1, True)
    assert "TP2 x PP1 x DP4" in capsys.readouterr().out
    lora = {key: value for key, value in reference.items() if key not in ("finetuning_type", *roles[1:])}
    assert imported(tmp_path, {**lora, "stage": "dpo"}, "--ranks", "1") is not None
    assert "layout: TP1 x PP1 x DP1" in capsys.readouterr().out
    more = imported(tmp_path, reference, "--ranks", "8", "--gpu-memory-gib", "40")
    assert more is not None
    assert more.parallel.tensor * more.parallel.pipeline > 2
    for options, message in (
        (("--ranks", "1"), "no layout of 1 GPUs fits: the smallest takes"),
        (("--ranks", "12"), "--ranks 12 are not whole nodes"),
        (("--ranks", "0"), "--ranks is 0: it must be positive"),
        (("--ranks", "8", "--ignore", "foo"), "--ignore foo"),
    ):
        assert imported(tmp_path, reference, *options) is None
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_template_that_is_not_known_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert imported(tmp_path, {**REFERENCE, "template": "falcon"}, "--ranks", "8") is None
    assert "template: falcon is not one of those known here" in capsys.readouterr().err
    own = imported(tmp_path, {**REFERENCE, "template": "falcon"}, "--ranks", "8", "--ignore", "template")
    assert own is not None
    assert own.data.chat_template is None


def test_command(tmp_path: Path) -> None:
    (tmp_path / "reference.yaml").write_text(yaml.safe_dump(REFERENCE))
    arguments = [str(tmp_path / "reference.yaml"), "--ranks", "8", "--train", "pairs.jsonl"]
    done = run_module("tgdpo.import_config", [*arguments, "--out", str(tmp_path / "ours.yaml")])
    assert "layout: NOT planned, there is no policy/config.json here" in done.stdout
    assert "max_prompt_length: left out, the authors' code never reads it" in done.stdout
    config = load_config(tmp_path / "ours.yaml")
    assert config.batch.global_pairs == 128
    assert Path(config.data.chat_template or "").read_text() == chat_template("llama3")


ENTRY = {
    "file_name": "pairs.json",
    "ranking": True,
    "formatting": "sharegpt",
    "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    "tags": {"role_tag": "from", "content_tag": "value"},
}


def dataset_file(info_file: Path, name: str) -> str:
    files, columns = dataset_files(info_file, {"dataset": name})
    assert not columns
    (file,) = files["dataset"]
    return file


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
    run_module("tgdpo.import_config", [*arguments, "--out", str(tmp_path / "ours.yaml")])
    data = load_config(tmp_path / "ours.yaml").data
    assert data.train == data.validation == str(tmp_path / "pairs.json")


def test_the_plain_form_is_taken(tmp_path: Path) -> None:
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    file = info(tmp_path, formatting=None, tags=None, columns=columns)
    assert dataset_file(file, "name") == str(tmp_path / "pairs.json")


def test_null_and_empty_columns_are_not_there(tmp_path: Path) -> None:
    for columns in (None, {"prompt": "instruction", "query": "", "history": None, "chosen": "chosen"}):
        (tmp_path / "dataset_info.json").write_text(
            json.dumps({"name": {"file_name": "pairs.json", "ranking": True, "columns": columns, "tags": None}})
        )
        (tmp_path / "pairs.json").write_text("[]")
        assert dataset_file(tmp_path / "dataset_info.json", "name") == str(tmp_path / "pairs.json")


def test_columns_that_only_this_project_would_read_are_refused(tmp_path: Path) -> None:
    columns = {"prompt": "instruction", "query": "", "chosen": "chosen", "rejected": "rejected"}
    file = info(tmp_path, formatting=None, tags=None, columns=columns)
    record = {"instruction": "a", "chosen": "b", "rejected": "c", "input": ""}
    (tmp_path / "pairs.json").write_text(json.dumps([record]))
    assert dataset_file(file, "name")
    (tmp_path / "pairs.json").write_text(json.dumps([record, {**record, "input": "more"}]))
    with pytest.raises(UserError, match=r"pairs\.json record 2: has 'input', which is read here"):
        dataset_file(file, "name")
    (tmp_path / "pairs.json").write_text(json.dumps(record) + "\n" + json.dumps({**record, "system": "s"}))
    with pytest.raises(UserError, match=r"pairs\.json:2: has 'system'"):
        dataset_file(file, "name")


def renamed_columns(tmp_path: Path, *records: dict[str, object]) -> Path:
    columns = {"prompt": "q", "query": "more", "system": "sys", "chosen": "good", "rejected": "bad"}
    file = info(tmp_path, formatting=None, tags=None, columns=columns)
    (tmp_path / "pairs.json").write_text(json.dumps(list(records)))
    return file


RENAMED = {"q": "a", "more": "b", "sys": "s", "good": "c", "bad": "d"}


def test_renamed_columns_become_data_columns(tmp_path: Path) -> None:
    file = renamed_columns(tmp_path, RENAMED)
    files, columns = dataset_files(file, {"dataset": "name", "eval_dataset": "name"})
    assert files == {key: [str(tmp_path / "pairs.json")] for key in ("dataset", "eval_dataset")}
    config = config_from_dict(convert(REFERENCE, 8, files["dataset"], None, columns=columns))
    assert config.data.columns == columns
    record = rename(RENAMED, config.data.columns or {}, "f:1")
    ours = {"instruction": "a", "input": "b", "system": "s", "chosen": "c", "rejected": "d"}
    assert parse_record(record, detect_layout(record, "f:1"), "f:1") == parse_record(ours, "instruction", "f:1")


def test_what_only_this_project_would_read_beside_renamed_columns_is_refused(tmp_path: Path) -> None:
    """Also a key of another layout, which would be taken for the prompt."""
    # "instruction" is not read: the column that is called so here takes its place.
    dataset_files(renamed_columns(tmp_path, {**RENAMED, "instruction": "x", "id": 3}), {"dataset": "name"})
    for key in ("prompt", "history", "conversations"):
        value = [["u", "v"]] if key == "history" else [{"role": "user", "content": "other"}]
        file = renamed_columns(tmp_path, RENAMED, {**RENAMED, key: value})
        with pytest.raises(UserError, match=rf"pairs\.json record 2: has '{key}', which is read here"):
            dataset_files(file, {"dataset": "name"})
    turn = {"role": "assistant", "content": "b"}
    file = info(tmp_path, formatting=None, tags=None, columns=None)
    (tmp_path / "pairs.json").write_text(json.dumps([{"prompt": "a", "chosen": [turn], "rejected": [turn]}]))
    with pytest.raises(UserError, match=r"record 1: by its columns, of which chosen, .* are read, it is no pair"):
        dataset_files(file, {"dataset": "name"})
    without = {key: value for key, value in RENAMED.items() if key != "more"}
    with pytest.raises(UserError, match=r"pairs\.json record 1: no key 'more', which data\.columns names"):
        dataset_files(renamed_columns(tmp_path, without), {"dataset": "name"})


def test_renamed_columns_of_parquet_are_read(tmp_path: Path) -> None:
    file = renamed_columns(tmp_path)
    entry = json.loads(file.read_text())["name"]
    file.write_text(json.dumps({"name": {**entry, "file_name": "pairs.parquet"}}))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([RENAMED]), tmp_path / "pairs.parquet")
    files, columns = dataset_files(file, {"dataset": "name"})
    assert files["dataset"] == [str(tmp_path / "pairs.parquet")]
    assert columns["instruction"] == "q"


def test_several_datasets_become_a_list(tmp_path: Path) -> None:
    entry = {"file_name": "a.json", "ranking": True}
    renamed = {**entry, "columns": {"prompt": "q", "chosen": "chosen", "rejected": "rejected"}}
    entries = {"a": entry, "b": {**entry, "file_name": "b.json"}, "other": {**renamed, "file_name": "b.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    for name in "ab":
        (tmp_path / f"{name}.json").write_text("[]")
    (tmp_path / "lf.yaml").write_text(yaml.safe_dump({**REFERENCE, "dataset": "b, a", "eval_dataset": "a"}))
    arguments = [str(tmp_path / "lf.yaml"), "--ranks", "8", "--dataset-info", str(tmp_path / "dataset_info.json")]
    run_module("tools.import_llamafactory_config", [*arguments, "--out", str(tmp_path / "ours.yaml")])
    data = load_config(tmp_path / "ours.yaml").data
    assert data.train == [str(tmp_path / "b.json"), str(tmp_path / "a.json")]
    assert (data.validation, data.columns) == (str(tmp_path / "a.json"), None)
    for key in ("dataset", "eval_dataset"):
        with pytest.raises(UserError, match=r"other calls its columns otherwise than a \(instruction: q, as here\)"):
            dataset_files(tmp_path / "dataset_info.json", {"dataset": "a", key: "a, other"})


@pytest.mark.parametrize("content", ["[" * 9999, "3", '{"name": 3}', "{", "\ud800"])
def test_a_dataset_info_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset_info.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"dataset_info\.json"):
        dataset_file(tmp_path / "dataset_info.json", "name")


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({}, "other", "no entry 'other'"),
        ({}, "name, other", "no entry 'other'"),
        ({"file_name": None, "hf_hub_url": "a/b"}, "name", "hf_hub_url is not downloaded here"),
        ({"file_name": "nowhere.json"}, "name", "nowhere.json is not a file"),
        ({"ranking": None}, "name", "not a file of preference pairs"),
        ({"num_samples": 10}, "name", "num_samples has no counterpart"),
        ({"formatting": "openai"}, "name", "formatting 'openai'"),
        ({"columns": {"prompt": "question"}}, "name", "columns.prompt is 'question', which has no counterpart"),
        ({"columns": 3}, "name", "columns is not a mapping"),
        ({"file_name": 3}, "name", "not a file of preference pairs"),
        ({"formatting": []}, "name", r"formatting \[\] is not supported"),
        ({"columns": {"images": "images"}}, "name", "columns.images is 'images', which has no counterpart"),
        ({"tags": {"role_tag": "speaker"}}, "name", "tags.role_tag is 'speaker', here only from, role"),
    ],
)
def test_what_has_no_counterpart_is_refused(tmp_path: Path, changes: dict, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataset_file(info(tmp_path, **changes), name)
