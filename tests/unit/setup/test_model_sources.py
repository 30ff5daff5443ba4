"""What models are made of: adapters in peft's directories, and every way in which one cannot be taken."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tgdpo.checkpoints.adapter_directory import BASE, LINEARS, Lora, read_base, read_lora
from megatron_tgdpo.checkpoints.find_model import find_local_model
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.errors import DamageError, UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.adapter_layout import new_adapter, peft_shapes, read_adapter
from megatron_tgdpo.setup.hub_inputs import pin_here
from megatron_tgdpo.setup.model_inputs import read_model_configs
from megatron_tgdpo.setup.model_sources import check_bases, model_sources, trained_lora
from tests.tiny_models import make_llama, make_model
from tests.unit.config.test_loading import VALID

ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "base", vocab_size=131)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base)


def make_adapter(path: Path, base: Path, **content: Any) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({**ADAPTER, **content}))
    shapes = peft_shapes(Lora(4, 8, ("q_proj", "v_proj")), read_hf_config(base))
    tensors = {f"base_model.model.{name}": torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


def config_of(policy: Path, guide: Path, **sections: Any) -> Config:
    model = {"policy": str(policy), "guide": str(guide), **sections.pop("model", {})}
    return config_from_dict({**VALID, "model": model, **sections})


def test_adapters_are_on_the_base_of_the_policy(base: Path, adapter: Path) -> None:
    sources = model_sources(config_of(base, adapter))
    assert (sources["guide"].base, sources["guide"].adapter) == (base, adapter)
    assert sources["reference"] == sources["policy"]
    assert sources["policy"].adapter is None
    continued = model_sources(config_of(base, adapter, lora={"adapter": str(adapter)}))
    assert continued["reference"] == continued["policy"] == continued["guide"]
    given = model_sources(config_of(base, adapter, lora={"adapter": str(adapter)}, model={"reference": str(base)}))
    assert given["reference"].adapter is None
    read_model_configs(config_of(base, adapter))


def test_what_an_adapter_is(base: Path, adapter: Path) -> None:
    assert read_lora(adapter) == Lora(4, 8.0, ("q_proj", "v_proj"))
    assert read_lora(adapter).scale == 2.0
    assert Lora(4, 8.0, rslora=True).scale == pytest.approx(8 / math.sqrt(4))
    assert trained_lora(config_of(base, adapter)) is None
    assert trained_lora(config_of(base, adapter, lora={"rank": 8})) == Lora(8, 16.0, LINEARS)
    some = trained_lora(config_of(base, adapter, lora={"rank": 8, "targets": ["fc1", "q_proj"], "alpha": 4}))
    assert some == Lora(8, 4.0, ("q_proj", "gate_proj", "up_proj"))
    with pytest.raises(UserError, match=r"lora.targets names lm_head: there are all-linear, q_proj"):
        trained_lora(config_of(base, adapter, lora={"rank": 8, "targets": ["lm_head"]}))
    with pytest.raises(UserError, match=r"lora.targets names \['q_proj'\]"):
        trained_lora(config_of(base, adapter, lora={"rank": 8, "targets": [["q_proj"]]}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"peft_type": "VERA"}, "an adapter of type VERA: only LORA"),
        ({"use_dora": True}, "use_dora is 'True': only plain LoRA"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is .*: only plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*: only plain LoRA"),
        ({"bias": "all"}, "bias is 'all': only plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': only plain LoRA"),
        ({"something_new": 1}, "something_new is '1': only plain LoRA"),
        ({"target_modules": ["lm_head"]}, r"target_modules names \['lm_head'\]"),
        ({"target_modules": []}, "target_modules names"),
        ({"target_modules": ["o_proj", "q_b_proj"]}, "names q_b_proj alone: supported are q_a_proj and q_b_proj"),
        ({"r": 0}, "r is 0: a positive number"),
        ({"r": 8}, "lora_A.weight has shape .*4.* ask for .*8"),
        ({"lora_alpha": "many"}, "lora_alpha is many"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"use_rslora": "false"}, "use_rslora is 'false'"),
        ({"target_modules": ["q_proj"]}, "v_proj.lora_A.weight has shape .* ask for None"),
    ],
)
def test_other_adapters_are_refused(base: Path, tmp_path: Path, content: dict[str, Any], message: str) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **content)
    with pytest.raises(UserError, match=message):
        read_model_configs(config_of(base, adapter))


def test_a_part_of_a_fused_linear_is_refused(tmp_path: Path) -> None:
    glm4 = make_model(tmp_path, "glm4", layers=2)
    read_model_configs(config_of(glm4, glm4, lora={"rank": 8, "targets": ["fc1", "down_proj"]}))
    with pytest.raises(UserError, match=r"lora.targets: .*of gate_proj, but gate_up_proj is one linear .*: name all"):
        read_model_configs(config_of(glm4, glm4, lora={"rank": 8, "targets": ["gate_proj"]}))


def test_an_adapter_of_another_base_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    wider = make_llama(tmp_path / "wider", vocab_size=131, hidden_size=96)
    with pytest.raises(UserError, match="an adapter of another base model"):
        read_model_configs(config_of(wider, adapter))
    # Of the same shape: where the adapter says what its base is.
    assert read_base(adapter) is None
    check_bases(model_sources(config_of(base, adapter)), "0123")
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", BASE: "4567"})
    check_bases(model_sources(config_of(base, adapter)), "4567")
    with pytest.raises(UserError, match=r"the guide's adapter .*another model than model.policy .* 4567, not 0123"):
        check_bases(model_sources(config_of(base, adapter)), "0123")


def test_damaged_and_pickled_adapters_are_refused(base: Path, adapter: Path) -> None:
    config, file = config_of(base, adapter), adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:40])
    with pytest.raises(DamageError, match=r"adapter_model.safetensors: damaged"):
        read_model_configs(config)
    file.write_bytes(content[:-8])
    with pytest.raises(DamageError, match=r"adapter_model.safetensors: damaged"):
        read_adapter(adapter, read_lora(adapter), read_hf_config(base))
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="weights as a pickle"):
        read_model_configs(config)


def test_tensors_of_other_types_and_false_headers_are_refused(base: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor.to(torch.int64) for name, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match="has dtype I64: only F64, F32, F16, BF16 are read"):
        read_model_configs(config_of(base, adapter))
    file.write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(DamageError, match="its header is longer than the file"):
        read_model_configs(config_of(base, adapter))


def test_a_whole_model_is_no_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    config = config_of(base, adapter, lora={"adapter": str(base)}, output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"^lora.adapter .*base: a whole model, no adapter: name it as model.policy"):
        pin_here(config, weights=True)


def test_values_that_are_not_finite_are_refused(base: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    # The second is finite before it is cast.
    for value, dtype in ((math.nan, torch.float32), (1e299, torch.float64)):
        changed = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        next(iter(changed.values()))[0, 0] = value
        save_file(changed, file)
        with pytest.raises(UserError, match="values that are not finite"):
            read_adapter(adapter, read_lora(adapter), read_hf_config(base))


def test_an_adapter_is_no_policy_and_does_not_move_to_the_host(base: Path, adapter: Path) -> None:
    assert find_local_model(adapter, "model.guide", adapter=True) == adapter
    with pytest.raises(UserError, match=r"model.policy: .*a LoRA adapter .*lora.adapter, model.reference"):
        find_local_model(adapter, "model.policy")
    sections = {
        "overlap.tensor": {"overlap": {"tensor": True}, "parallel": {"tensor": 2, "sequence_parallel": True}},
        "precision.frozen": {"precision": {"fp8": "mxfp8"}},
    }
    for key, section in sections.items():
        with pytest.raises(UserError, match=f"^model.guide is an adapter, and .*{key}"):
            read_model_configs(config_of(base, adapter, **section))
    with pytest.raises(UserError, match=r"^model.guide is an adapter, and offload.frozen moves whole models only"):
        read_model_configs(config_of(base, adapter, offload={"frozen": True}))


def test_a_new_adapter_begins_as_peft_does(base: Path) -> None:
    hf_config, lora = read_hf_config(base), Lora(4, 8, ("q_proj", "down_proj"))
    made = dict(new_adapter(lora, hf_config, 1))
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == peft_shapes(lora, hf_config)
    for name, tensor in made.items():
        if "lora_B" in name:
            assert not tensor.any()
        else:
            bound = 1 / math.sqrt(tensor.shape[1])
            assert bound * 0.9 < tensor.abs().max() <= bound
            # Uniform: its standard deviation is bound / sqrt(3).
            assert tensor.std() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    other = dict(new_adapter(lora, hf_config, 2))
    assert not torch.equal(*(each["model.layers.0.self_attn.q_proj.lora_A.weight"] for each in (made, other)))
    first, second = (made[f"model.layers.{n}.self_attn.q_proj.lora_A.weight"] for n in (0, 1))
    assert not torch.equal(first, second)


def test_adapters_of_models_with_experts(tmp_path: Path, base: Path) -> None:
    experts = make_model(tmp_path / "experts", "qwen3_moe", layers=1)
    assert read_model_configs(config_of(experts, base, lora={"rank": 4}))["guide"].model_type == "llama"
    assert read_model_configs(config_of(base, experts, lora={"rank": 4}))["guide"].model_type == "qwen3_moe"
    with pytest.raises(UserError, match=r"lora.targets: an adapter of up_proj, but gate_up_proj is one linear"):
        read_model_configs(config_of(experts, base, lora={"rank": 4, "targets": ["q_proj", "up_proj"]}))
    # All of a layer's experts in one, the first of two within the second as its base layer.
    shapes = peft_shapes(Lora(3, 8), read_hf_config(experts))
    layer = "model.layers.0.mlp.experts"
    assert shapes[f"{layer}.base_layer.lora_A.weight"] == shapes[f"{layer}.lora_B.weight"][::-1] == (12, 64)
    assert shapes[f"{layer}.base_layer.lora_B.weight"] == (96, 12)
    assert f"{layer}.lora_A.weight" in peft_shapes(Lora(3, 8, ("gate_proj", "up_proj")), read_hf_config(experts))
    # Biases are not where an adapter would be applied.
    biased = make_model(tmp_path / "biased", "gpt_oss")
    with pytest.raises(UserError, match=r"lora.targets: .*experts have biases.* attention") as error:
        read_model_configs(config_of(biased, base, lora={"rank": 4}))
    assert "\n" not in str(error.value)
    attention = {"rank": 4, "targets": ["q_proj", "o_proj"]}
    assert "policy" in read_model_configs(config_of(biased, base, lora=attention))
