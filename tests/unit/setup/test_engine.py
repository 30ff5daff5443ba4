"""Checks made before anything is loaded: vocabularies, tokenizers, layouts, and the parameter count of a dry run."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.divisibility import check_layout
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.planning.memory import stage_parameters
from megatron_tgdpo.resilience.run_lock import RunLock
from megatron_tgdpo.setup.datasets import prepare_data
from megatron_tgdpo.setup.model_inputs import check_tokenizers, read_model_configs
from megatron_tgdpo.training.run import dry_run
from megatron_tgdpo.training.run_data import open_data, prepare_on_rank0
from tests.tiny_models import make_llama, make_tokenizer
from tests.unit.config.test_loading import VALID


def config_of(policy: Path, guide: Path) -> Config:
    return config_from_dict({**VALID, "model": {"policy": str(policy), "guide": str(guide)}})


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("setup") / "policy", vocab_size=131)


def test_a_guide_with_other_padding_rows(policy: Path, tmp_path: Path) -> None:
    """Rows of an embedding that no token has are no difference, but only a tokenizer tells which these are."""
    guide = make_llama(tmp_path / "guide", vocab_size=140)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (guide / file).write_bytes((policy / file).read_bytes())
    config = config_of(policy, guide)
    assert {role: found.vocab_size for role, found in read_model_configs(config).items()} == {
        "policy": 131, "reference": 131, "guide": 140
    }  # fmt: skip
    assert not any(lacking.tokens for lacking in check_tokenizers(config))
    for file in guide.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"guide.*vocabulary of 140.*put them into the directories"):
        read_model_configs(config)


def test_a_guide_with_another_tokenizer(policy: Path, tmp_path: Path) -> None:
    guide = make_llama(tmp_path / "guide", vocab_size=131)
    check_tokenizers(config_of(policy, guide))
    swap_ids(guide)
    with pytest.raises(UserError, match=r"model.guide .* another tokenizer than the policy .*'w10' is 11 there and 10"):
        check_tokenizers(config_of(policy, guide))


def test_data_is_not_tokenised_with_other_ids_than_the_policy_has(policy: Path, tmp_path: Path) -> None:
    make_tokenizer(131).save_pretrained(tmp_path / "tokenizer")
    data = {**VALID["data"], "tokenizer": str(tmp_path / "tokenizer")}
    values = {**VALID, "model": {"policy": str(policy)}, "data": data, "loss": {"method": "dpo"}}
    config = config_from_dict(values)
    check_tokenizers(config)
    swap_ids(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"model.policy .* than data.tokenizer .*: 'w11' is 11 there and 10 here"):
        check_tokenizers(config)


def swap_ids(directory: Path) -> None:
    text = make_tokenizer(131).backend_tokenizer.to_str().replace('"w10"', '"tmp"').replace('"w11"', '"w10"')
    (directory / "tokenizer.json").write_text(text.replace('"tmp"', '"w11"'))


def test_a_linked_file_of_the_policy_is_refused_before_the_first_save(tmp_path: Path) -> None:
    policy = make_llama(tmp_path / "policy", layers=1)
    (tmp_path / "secret").write_text("{}")
    (policy / "vocab.json").symlink_to(tmp_path / "secret")
    out = tmp_path / "out"
    values = {**VALID, "model": {"policy": str(policy)}, "loss": {"method": "dpo"}, "output_dir": str(out)}
    with pytest.raises(UserError, match=r"vocab.json: a link to .*/secret"):
        prepare_on_rank0(config_from_dict(values), RunLock(out))
    assert not out.exists()


def test_warm_up_that_takes_all_steps_is_refused(policy: Path, tmp_path: Path) -> None:
    """Where epochs decide, only the data tells how many steps there are."""
    pairs = [{"prompt": f"w{number}", "chosen": " w5", "rejected": " w6"} for number in range(7, 15)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = {**VALID["data"], "train": str(tmp_path / "pairs.jsonl"), "validation": None, "workers": 1}
    values = {
        **VALID,
        "model": {"policy": str(policy)},
        "data": data,
        "loss": {"method": "dpo"},
        "train": {"epochs": 2},
    }
    optimizer, batch = {**VALID.get("optimizer", {}), "lr": 1e-3}, {**VALID["batch"], "global_pairs": 4}
    for steps, fits in ((None, True), (3, True), (4, False)):
        config = config_from_dict({**values, "batch": batch, "optimizer": {**optimizer, "warmup_steps": steps}})
        prepared = prepare_data(config, tmp_path / "cache", [])
        with nullcontext() if fits else pytest.raises(UserError, match="warmup_steps is 4 and the run has 4 steps"):
            assert open_data(config, prepared, read_model_configs(config)).order.steps == 4


def test_dynamic_rope_scaling_holds_up_to_its_original_length(tmp_path: Path) -> None:
    policy = make_llama(tmp_path / "dynamic", rope={"rope_type": "dynamic", "factor": 2.0}, layers=1)
    values = {**VALID, "model": {"policy": str(policy)}, "loss": {"method": "dpo"}}
    read_model_configs(config_from_dict({**values, "data": {**VALID["data"], "max_length": 2048}}))
    with pytest.raises(UserError, match=r"model.policy .* rope scaling.* data.max_length to at most 2048"):
        read_model_configs(config_from_dict({**values, "data": {**VALID["data"], "max_length": 2049}}))


def test_a_guide_that_is_not_there(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        read_model_configs(config_of(policy, tmp_path / "absent"))


@pytest.mark.parametrize(
    ("tensor", "pipeline", "expected"),
    [
        (1, 5, r"4 layers are fewer than parallel\.pipeline = 5 stages: set parallel.pipeline to at most 4"),
        (8, 1, r"4 attention heads are not divisible"),
    ],
)
def test_layouts_that_do_not_divide_the_model(policy: Path, tensor: int, pipeline: int, expected: str) -> None:
    layout = make_layout(tensor, pipeline, 1, False, tensor * pipeline)
    with pytest.raises(UserError, match=expected):
        check_layout({"policy": read_hf_config(policy)}, layout)


def test_dry_run(policy: Path, tmp_path: Path) -> None:
    guide = make_llama(tmp_path / "guide", vocab_size=131)
    config = config_from_dict(
        {
            **VALID,
            "model": {"policy": str(policy), "guide": str(guide)},
            "parallel": {"tensor": 2, "pipeline": 2},
            "output_dir": str(tmp_path / "run"),
        }
    )
    text, _ = dry_run(config, 8)
    assert "ranks: 8 = TP2 x PP2 x DP2" in text
    assert "global_pairs: 8" in text
    # The first stage holds more micro batches in flight, and so the most memory.
    fullest = stage_parameters(read_hf_config(policy), make_layout(2, 2, 1, False, 8), 0)
    assert f"policy {fullest:,}, frozen {2 * fullest:,}" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_is_that_of_the_weights_plus_padding(tmp_path: Path, tied: bool) -> None:
    path = make_llama(tmp_path / "model", vocab_size=131, tied=tied)
    stored = sum(tensor.numel() for tensor in load_file(path / "model.safetensors").values())
    padding = (256 - 131) * 64 * (1 if tied else 2)
    assert stage_parameters(read_hf_config(path), make_layout(1, 1, 1, False, 1), 0) == stored + padding
