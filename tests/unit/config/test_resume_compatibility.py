"""Every key of the config has a rule for when it may change, and the rules are kept."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_tgdpo.config.loading import config_from_dict, to_dict
from megatron_tgdpo.config.resume_compatibility import (
    CHANGE_POLICIES,
    INPUTS,
    POLICY_OF,
    ChangePolicy,
    Recorded,
    check_changes,
    find_changes,
    flatten,
)
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.errors import UserError
from tests.unit.config.test_loading import VALID

CONFIG = config_from_dict(VALID)
CONTENT = {key: f"{key} {'0' * 64}" for key in INPUTS}
OUT = CONFIG.output_dir
RUN = Recorded(Path("out/checkpoints/step_00000004"), to_dict(CONFIG), CONTENT)


def changed(**sections: dict[str, Any]) -> Config:
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in VALID.items()}
    return config_from_dict({**values, **{name: {**values.get(name, {}), **new} for name, new in sections.items()}})


def test_every_key_has_exactly_one_rule() -> None:
    assert set(POLICY_OF) == set(flatten(to_dict(CONFIG)))
    assert set(Counter(key for keys in CHANGE_POLICIES.values() for key in keys).values()) == {1}
    assert set(INPUTS) <= set(POLICY_OF)


def test_the_documentation_has_the_same_table() -> None:
    text = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()
    for rule, keys in CHANGE_POLICIES.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {rule.value.split(':')[0]} |")]
        named = set(re.findall(r"`([a-z_0-9.]+)`", row.split("|")[2]))
        sections = {name for name in named if "." not in name and name != "output_dir"}
        assert {key for key in keys if key.split(".")[0] not in sections} == named - sections
        assert all(POLICY_OF[key] is rule for key in POLICY_OF if key.split(".")[0] in sections)


def test_the_same_run_has_no_changes() -> None:
    assert find_changes(RUN, CONFIG, CONTENT) == []
    assert find_changes(RUN, changed(train={"resume": "changed", "exit_step": 3, "rehash": True}), CONTENT) == []


def test_what_changes_nothing_that_is_computed_may_change_unasked() -> None:
    changes = find_changes(RUN, changed(parallel={"tensor": 2}, checkpoint={"keep": 5}), CONTENT)
    assert [str(change) for change in changes] == ["parallel.tensor 2, was 1", "checkpoint.keep 5, was 2"]
    check_changes(RUN, changes, OUT, asked=False)


def test_what_changes_the_training_is_to_be_asked_for() -> None:
    config = changed(optimizer={"lr": 1e-3}, loss={"alpha": 0.9})
    changes = find_changes(RUN, config, CONTENT)
    with pytest.raises(UserError, match=r"loss\.alpha 0\.9, was 0\.5; optimizer\.lr 0\.001, was 1e-06: give train"):
        check_changes(RUN, changes, OUT, asked=False)
    check_changes(RUN, changes, OUT, asked=True)
    assert changes[0].record(4) == {"after_step": 4, "key": "loss.alpha", "was": 0.5, "now": 0.9}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("train", "seed", 5), ("data", "shuffle", False), ("precision", "dtype", "fp32")],
)
def test_what_makes_another_run_is_refused_even_if_asked_for(section: str, key: str, value: Any) -> None:
    config = changed(**{section: {key: value}})
    with pytest.raises(UserError, match=rf"step_00000004 cannot be continued with {section}\.{key}"):
        check_changes(RUN, find_changes(RUN, config, CONTENT), OUT, asked=True)


def test_files_are_compared_by_content_and_not_by_path() -> None:
    moved = changed(model={"policy": "elsewhere", "guide": "there"}, data={"train": "again.jsonl"})
    assert find_changes(RUN, moved, CONTENT) == []
    assert find_changes(RUN, moved, None) == []
    (guide,) = find_changes(RUN, CONFIG, {**CONTENT, "model.guide": "f" * 64})
    assert str(guide) == "model.guide of other weights (ffffffffffff, was model.guide )"
    assert guide.policy is ChangePolicy.ASKED
    (policy,) = find_changes(RUN, CONFIG, {**CONTENT, "model.policy": "f" * 64})
    with pytest.raises(UserError, match=r"cannot be continued with model\.policy of other weights"):
        check_changes(RUN, [policy], OUT, asked=True)


def test_runs_of_versions_with_fewer_and_with_other_keys_can_be_compared() -> None:
    before = to_dict(CONFIG)
    del before["offload"], before["train"]["resume"]
    before["removed"] = {"key": 1}
    old = Recorded(RUN.source, before, {"data.train": CONTENT["data.train"]})
    assert find_changes(old, CONFIG, CONTENT) == []
    (offload,) = find_changes(old, changed(offload={"frozen": True}), CONTENT)
    assert (offload.key, offload.was, offload.now) == ("offload.frozen", False, True)


def test_an_option_that_the_method_has_got_since_was_at_its_default() -> None:
    before = to_dict(CONFIG)
    # Its version did not know the one, and recorded the other as not used.
    del before["loss"]["form"]
    before["loss"]["label_smoothing"] = None
    old = Recorded(RUN.source, before, CONTENT)
    assert find_changes(old, CONFIG, CONTENT) == []
    (form,) = find_changes(old, changed(loss={"form": "ipo"}), CONTENT)
    assert (form.key, form.was, form.now) == ("loss.form", "sigmoid", "ipo")
