"""What values may be stands at the fields; every number and every choice of words has it."""

from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass, replace
from typing import Any, get_args, get_type_hints

import pytest

from megatron_tgdpo.config.checks import check
from megatron_tgdpo.config.constraints import Rule, first_broken
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.rules import RULES
from megatron_tgdpo.config.schema import Config, LossConfig
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.loss.choices import FORMS, WEIGHTS
from megatron_tgdpo.loss.methods import METHODS
from tests.unit.config.test_loading import VALID

# Text that may be anything: names of files, and of models and datasets.
FREE = {
    "model.policy", "model.reference", "model.guide", "lora.adapter", "data.tokenizer", "data.chat_template",
    "guide.output_dir", "guidance.cache", "train.branch_from", "checkpoint.best_metric",
}  # fmt: skip


def keys() -> Iterator[tuple[str, str, Field, tuple[Any, ...]]]:
    """Sections and keys with their fields and types."""
    for section, kind in get_type_hints(Config).items():
        if is_dataclass(kind):
            for field in fields(kind):
                hint = get_type_hints(kind)[field.name]
                yield section, field.name, field, get_args(hint) or (hint,)


@pytest.mark.parametrize(
    ("section", "name", "field"),
    [(s, n, f) for s, n, f, types in keys() if {int, float} & set(types)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_number_has_a_least_value(section: str, name: str, field: Field) -> None:
    config = config_from_dict(VALID)
    wrong = replace(getattr(config, section), **{name: -7})
    with pytest.raises(UserError, match=rf"^here: {section}\.{name} is -7: it must ") as caught:
        check(replace(config, **{section: wrong}), "here")
    assert "\n" not in str(caught.value)


def test_every_word_is_one_of_some_or_a_name() -> None:
    words = {f"{section}.{name}": field for section, name, field, types in keys() if str in types}
    assert {key for key, field in words.items() if "constraint" not in field.metadata} == FREE


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.message[:40])
def test_messages_of_rules_can_be_written_and_name_a_key(rule: Rule) -> None:
    config = config_from_dict(VALID)
    assert not rule.broken(config)
    message = first_broken([Rule(lambda c: True, rule.message)], config)
    assert message is not None
    assert "{" not in message
    assert any(f"{section}.{name}" in message for section, name, _, _ in keys())


def test_methods_and_their_options() -> None:
    """Every option belongs to a method, and every row's loss is there."""
    options = {field.name for field in fields(LossConfig)} - {"method"}
    assert options == {option for row in (*METHODS.values(), *WEIGHTS.values()) for option in row.options}
    assert all(callable(method.loss_function) for method in METHODS.values())
    assert all(callable(weights.weight_function) for weights in WEIGHTS.values())
    assert all(callable(form.loss_function) for form in FORMS.values())


def test_weights_bring_their_options() -> None:
    tgdpo, sepo = METHODS["tgdpo"], METHODS["tgdpo"].given({"weights": "sepo"})
    assert set(tgdpo.options) - set(sepo.options) == {"alpha"}
    assert set(sepo.options) - set(tgdpo.options) == {"select_share"}
    assert METHODS["dpo"].given({"weights": "confpo"}).options == METHODS["dpo"].options


def test_metrics_that_a_method_has_not() -> None:
    assert METHODS["tgdpo"].without == ()
    guidance = {"guidance/guide_", "guidance/weight", "guidance/negative"}
    assert set(METHODS["dpo"].without) == guidance
    assert METHODS["dpo"].given({"weights": "confpo"}).without == ("guidance/guide_",)
    assert set(METHODS["simpo"].without) == guidance | {"logps/reference_"}
    absent = {"logps/reference_", "rewards/", "margins/", "logps/rejected"}
    assert set(METHODS["sft"].without) == guidance | absent
