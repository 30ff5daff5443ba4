"""Values arrive as the config's fields type them, and what cannot be meant is refused by key and line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from megatron_tgdpo.config.loading import load_config, read_recorded, to_yaml
from megatron_tgdpo.config.names import ELSEWHERE
from megatron_tgdpo.config.resume_compatibility import flatten
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.config.values import typed, typed_override
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.yaml_text import read_yaml

VALID = """\
model: {policy: policy, guide: guide}
data: {train: pairs.jsonl}
batch: {global_pairs: 8}
optimizer: {lr: 1e-6}
train: {steps: 10}
output_dir: out
"""
KEYS = list(
    flatten({name: vars(value) if hasattr(value, "__dict__") else value for name, value in vars(Config()).items()})
)


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    return load_config(tmp_path / "config.yaml", overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{tmp_path}/", "")


# YAML 1.1 makes a number, a date, a truth value or a comment of these.
TEXTS = ["2026_11_27", "2026-11-27", "012", "0x10", "1:30", "1e3", "off", "No", "true", ".inf", "a: b", "=", "{a", "@x"]


@pytest.mark.parametrize("text", [*TEXTS, "/data/a # b", "'quoted", "[1]", "*a", "&a"])
def test_an_override_of_text_is_taken_as_it_is(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, VALID, f"output_dir={text}", f"model.reference={text}")
    assert (config.output_dir, config.model.reference) == (text, text)
    assert load(tmp_path, to_yaml(config)) == config


@pytest.mark.parametrize("text", [text for text in TEXTS if text[0] not in "@{" and text != "a: b"])
def test_text_in_a_file_is_taken_as_it_is(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, VALID.replace("out\n", f"{text}\n")).output_dir == text
    assert load(tmp_path, VALID.replace("out\n", f"'{text} # x' # a comment\n")).output_dir == f"{text} # x"


def test_null_is_null_unless_quoted(tmp_path: Path) -> None:
    for written in ("null", "~", ""):
        assert load(tmp_path, VALID, f"model.reference={written}").model.reference is None
        assert load(tmp_path, VALID + f"data.x: &x {written}\n".replace("data.x", "loss")).loss.beta == 0.1
    assert load(tmp_path, VALID, "model.reference='null'").model.reference == "null"
    assert "config.yaml:6: output_dir is null: it must be text" in refusal(tmp_path, VALID.replace("out\n", "null\n"))


@pytest.mark.parametrize(
    ("written", "value"), [("yes", True), ("On", True), ("true", True), ("no", False), ("OFF", False)]
)
def test_truth_values_have_one_meaning(tmp_path: Path, written: str, value: bool) -> None:
    assert load(tmp_path, VALID, f"log.wandb={written}").log.wandb is value
    assert load(tmp_path, f"{VALID}log: {{wandb: {written}}}\n").log.wandb is value


def test_a_choice_is_text(tmp_path: Path) -> None:
    assert load(tmp_path, VALID.replace("steps: 10", "steps: 10, fused: off")).train.fused == "off"
    assert load(tmp_path, VALID, "train.fused=off").train.fused == "off"


def test_numbers_are_decimal(tmp_path: Path) -> None:
    config = load(tmp_path, VALID.replace("1e-6", '"5e-7"'), "train.seed=1_000", "loss.beta=1", "loss.alpha=.5")
    assert (config.optimizer.lr, config.train.seed, config.loss.beta, config.loss.alpha) == (5e-7, 1000, 1.0, 0.5)
    assert isinstance(config.loss.beta, float)


@pytest.mark.parametrize("written", ["012", "1:30", "0x10", "0o17", "1e3", "8.0", "true", "eight", "9" * 5000])
def test_what_is_no_whole_number_is_refused(tmp_path: Path, written: str) -> None:
    assert "train.seed is '" in refusal(tmp_path, VALID, f"train.seed={written}")
    message = refusal(tmp_path, VALID.replace("steps: 10", f"seed: {written}, steps: 10"))
    assert message.startswith("config.yaml:5: train.seed is '")
    assert "must be a whole number" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=inf", "optimizer.lr is inf: it must be a finite number"),
        ("loss.beta=.nan", "loss.beta is .nan: it must be a finite number"),
        ("loss.alpha=-Infinity", "loss.alpha is -Infinity: it must be a finite number"),
        ("optimizer.lr=1e400", "optimizer.lr is 1e400: the number is too large"),
        ("parallel.timeout_minutes=1e300", "parallel.timeout_minutes is 1e+300: it must be at most 525,600"),
        ("optimizer.eps=1e-300", "optimizer.eps is 1e-300: it must be at least 1.2e-38"),
        ("data.max_length=99999999999999999999", "data.max_length is 1e+20: it must be at most 536,870,912"),
        ("data.workers=1000000", "data.workers is 1e+06: it must be at most 4,096"),
        ("train.steps=99999999999", "train.steps is 1e+11: it must be at most 2,147,483,647"),
        ("train.keep_logits_mib=-1", "train.keep_logits_mib is -1: it must not be negative"),
        ("output_dir=' '", "output_dir is empty"),
        ("output_dir=a\0b", "output_dir is 'a\\x00b': a value cannot contain control characters"),
        ("output_dir=a\udcffb", "output_dir is 'a\\udcffb': a value cannot contain control characters"),
        ("output_dir=${", "output_dir: no viable alternative"),
        ("output_dir=${output_dir}", "output_dir: Recursive interpolation"),
        (r"output_dir=\${x}", "output_dir is '${x}': a value cannot contain ${"),
        ("optimizer=3", "optimizer is '3': it must be a mapping of keys to values"),
        ("optimizer={lr: 1, lr: 2}", "lr is set twice"),
        ("loss.beta.x=1", "loss.beta.x: no such key; loss.beta is a number or null"),
        ("loss.beta=[1]", "loss.beta is '[1]': it must be a number or null"),
        ("=1", "not of the form section.key=value"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in refusal(tmp_path, VALID, override)


def test_environment_variables_have_the_type_of_the_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASK", "7")
    config = load(tmp_path, VALID, "train.seed=${oc.env:TASK}", "output_dir=/runs/${oc.env:TASK}")
    assert (config.train.seed, config.output_dir) == (7, "/runs/7")
    monkeypatch.setenv("TASK", "inf")
    assert "optimizer.lr is inf" in refusal(tmp_path, VALID, "optimizer.lr=${oc.env:TASK}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (VALID + "loss:\n  beta: 1\n  alpha: 2\n  beta: 3\n", "config.yaml: beta is set twice, in lines 8 and 10"),
        (VALID + "data: {train: x}\n", "config.yaml: data is set twice, in lines 2 and 7"),
        (VALID + "loss:\n  betta: 1\n", "config.yaml:8: loss.betta: no such key; did you mean loss.beta?"),
        (VALID + "loss.beta: 1\n", "config.yaml:7: loss.beta: no such key; write loss: and, indented below it, beta:"),
        (VALID + "loss: [1]\n", "config.yaml:7: loss is a list: it must be a mapping of keys to values"),
        (VALID + "loss: {beta: {x: 1}}\n", "config.yaml:7: loss.beta has keys of its own: it must be a number or null"),
        (VALID + "? [a]\n: 1\n", "config.yaml:7: a key must be text"),
        ("loss: &x {beta: 1, alpha: *x}\n", "config.yaml:1: an alias refers to what it is part of"),
        ("a: !!python/name:os.system\n", "config.yaml:1: the tag tag:yaml.org,2002:python/name:os.system is not read"),
        ("- 1\n", "config.yaml: not a mapping of keys to values"),
        ("\0", "config.yaml: not valid YAML"),
        ('a: "\\U99999999"\n', "config.yaml: not valid YAML"),
        ("[" * 9999, "config.yaml: not valid YAML: nested too deeply"),
        ("a: 1\n---\nb: 2\n", "config.yaml:2: not valid YAML: but found another document, expected a single document"),
        ("#" * (1 << 21), "config.yaml: more than 1024 KiB are not a config"),
        ("a: [" + "1, " * 30_000 + "]", "more than 20,000 values are not a config"),
        ("a: &a [" + "1, " * 999 + "]\nb: &b [" + "*a, " * 99 + "]\n", "more than 20,000 values"),
    ],
)
def test_files_that_cannot_be_meant_are_refused_by_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(tmp_path, text)


def test_merge_keys_and_aliases(tmp_path: Path) -> None:
    text = VALID.replace(
        "data: {train: pairs.jsonl}", "data:\n  <<: {max_length: 8, train: a}\n  train: &p b\n  tokenizer: *p"
    )
    data = load(tmp_path, text).data
    assert (data.max_length, data.train, data.tokenizer) == (8, "b", "b")


def test_a_section_may_be_empty_or_be_given_whole(tmp_path: Path) -> None:
    assert load(tmp_path, VALID + "loss:\n  # nothing\n", "optimizer={lr: 1e-7}").optimizer.lr == 1e-7


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        ("learning_rate", "optimizer.lr"),
        ("train.learning_rate", "optimizer.lr"),
        ("--learning-rate", "optimizer.lr"),
        ("per_device_train_batch_size", "batch.global_pairs"),
        ("gradient_accumulation_steps", "batch.global_pairs"),
        ("num_train_epochs", "train.epochs"),
        ("pref_beta", "loss.beta"),
        ("policy.megatron_cfg.tensor_model_parallel_size", "did you mean model.policy"),
        ("tensor_model_parallel_size", "parallel.tensor"),
        ("beta", "loss.beta"),
        ("optimizer.beta", "optimizer.beta"),
        ("every_steps", "eval.every_steps or eval.generate.every_steps or checkpoint.every_steps or log.every_steps"),
        ("eval.eval_steps", "eval.every_steps"),
        ("optimizer.weight_decy", "optimizer.weight_decay"),
        ("optimiser", "did you mean optimizer?"),
        ("learning_rte", "optimizer.lr"),
        ("lora_r", "did you mean lora.rank?"),
        ("train.foo", "train has steps, epochs, seed"),
        ("zzz", "there are model, lora, data, loss"),
    ],
)
def test_an_unknown_key_suggests_the_right_one(tmp_path: Path, unknown: str, meant: str) -> None:
    assert meant in refusal(tmp_path, VALID, f"{unknown}=1")


def test_names_of_other_projects_lead_to_keys_that_there_are() -> None:
    for name, meant in ELSEWHERE.items():
        assert meant.startswith("none: ") or meant.split(",")[0].split(":")[0].split(" ")[0] in KEYS, name


def test_a_recorded_config_keeps_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("loss: {beta: 0.5, gone: 1}\nold: {x: 1}\noutput_dir: 2026_11_27\n")
    assert read_recorded(tmp_path / "config.yaml") == {"loss": {"beta": 0.5}, "output_dir": "2026_11_27"}


@dataclass
class Wide:
    """Types that fields may have, beyond those of today."""

    columns: dict[str, str] | None = None
    arguments: dict[str, Any] | None = None
    anything: Any = None
    files: Any = field(default=None, metadata={"type": str | list[str | dict[str, str]] | None})
    choice: Literal["a", "b"] = "a"


def test_mappings_lists_and_values_of_any_type() -> None:
    text = "columns: {prompt: 012}\narguments: {think: false, n: 3, x: 1.5, s: word, q: 'no', l: [1, a]}\nfiles: 1_2\n"
    assert typed(Wide, read_yaml(text, "file"), "", "file") == {
        "columns": {"prompt": "012"},
        "arguments": {"think": False, "n": 3, "x": 1.5, "s": "word", "q": "no", "l": [1, "a"]},
        "files": "1_2",
    }
    assert typed_override(Wide, "files=012") == {"files": "012"}
    assert typed_override(Wide, "files=[a, {path: b, weight: 1}]") == {"files": ["a", {"path": "b", "weight": "1"}]}
    assert typed_override(Wide, "columns.prompt=a # b") == {"columns": {"prompt": "a # b"}}
    assert typed_override(Wide, "arguments.think=false") == {"arguments": {"think": False}}
    with pytest.raises(UserError, match="choice is 'c': it must be a or b"):
        typed_override(Wide, "choice=c")


@pytest.mark.parametrize("word", ["no", "Off", "yes", "012", "1:30", "1_000", "0x1F", "2026-11-27", ".inf"])
def test_what_yaml_reads_in_two_ways_is_refused_where_the_type_is_open(word: str) -> None:
    assert yaml.safe_load(word) != word
    with pytest.raises(UserError, match=r"file:1: arguments\.x is '.*', which YAML's versions read differently"):
        typed(Wide, read_yaml(f"arguments: {{x: {word}}}", "file"), "", "file")
