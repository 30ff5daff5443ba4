"""Adapters of experts in directories of ``peft``: read, and merged, as ``peft`` itself merges them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints_convert.export_adapter import peft_config
from megatron_tgdpo.checkpoints.adapter_directory import Lora, read_lora
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.adapter_layout import (
    check_adapter,
    factors,
    fused_linears,
    of_expert,
    peft_shapes,
    peft_tensors,
    read_adapter,
)
from tests.tiny_models import MIXED_OPTIONS, make_model

peft = pytest.importorskip("peft")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make(root: Path, family: str, parameters: list[str]) -> tuple[Path, Path, Any]:
    """A model with experts, a random adapter of it, and the two in one by ``peft``."""
    base, path = make_model(root / family, family, layers=1, vocab_size=64, hidden_size=32), root / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=parameters)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(path)
    return base, path, adapted.merge_and_unload()


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        ("qwen3_moe", EXPERTS),
        ("olmoe", EXPERTS),
        ("mixtral", EXPERTS[::-1]),
        ("qwen2_moe", EXPERTS[:1]),
        ("qwen3_moe", ["experts.down_proj"]),
    ],
)
def test_merged_weights_are_those_of_peft(tmp_path: Path, family: str, parameters: list[str]) -> None:
    base, path, merged = make(tmp_path, family, parameters)
    merged.save_pretrained(tmp_path / "merged")
    expected, weights = load_file(tmp_path / "merged" / "model.safetensors"), load_file(base / "model.safetensors")
    lora, hf_config = read_lora(path), read_hf_config(base)
    assert expected.keys() == weights.keys()
    changed = set()
    for name, a, b in factors(read_adapter(path, lora, hf_config), lora, hf_config):
        weights[name] = weights[name].addmm(b, a, alpha=lora.scale)
        changed.add(name)
    before = load_file(base / "model.safetensors")
    assert changed == {name for name, tensor in before.items() if not torch.equal(tensor, expected[name])}
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-6)


def test_experts_are_stacked_and_unstacked(tmp_path: Path) -> None:
    hf_config = read_hf_config(make_model(tmp_path / "model", "mixtral", layers=1, vocab_size=64, hidden_size=32))
    lora = Lora(3, 5.0)
    for fused in (each for each in fused_linears(hf_config) if each.experts):
        a, b = torch.randn(fused.experts, 3, 8), torch.randn(fused.experts, 2, 5, 3)
        tensors = dict(peft_tensors(fused, 0, a, b, lora, hf_config))
        name = "model.layers.0.mlp.experts" + ("" if fused.row_parallel else ".base_layer")
        for expert in range(fused.experts):
            found = of_expert(tensors, name, fused.experts, expert)
            assert torch.equal(found[0], a[expert])
            assert torch.equal(found[1], b[expert].flatten(0, 1))


@pytest.mark.parametrize("name", MIXED_OPTIONS)
def test_peft_adapts_the_same_of_models_with_and_without_experts_in_layers(tmp_path: Path, name: str) -> None:
    """Not the shared expert, whose linears have the names of a dense MLP's."""
    path = make_model(tmp_path / "model", layers=2, vocab_size=64, hidden_size=32, **MIXED_OPTIONS[name])
    hf_config, lora = read_hf_config(path), Lora(3, 5.0)
    content = peft_config(lora, None, hf_config)
    targets = {key: content[key] for key in ("target_modules", "target_parameters")}
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), peft.LoraConfig(r=3, lora_alpha=5, **targets)
    )
    model.save_pretrained(tmp_path / "adapter")
    prefix = "base_model.model."
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {key.removeprefix(prefix): tuple(tensor.shape) for key, tensor in found.items()}
    assert shapes == peft_shapes(lora, hf_config)
    assert read_lora(tmp_path / "adapter") == lora
    check_adapter(tmp_path / "adapter", lora, hf_config)


def test_other_adapters_of_experts_are_refused(tmp_path: Path) -> None:
    base, path, _ = make(tmp_path, "qwen3_moe", EXPERTS)
    hf_config, file = read_hf_config(base), path / "adapter_config.json"
    content = json.loads(file.read_text())
    for parameters in (
        ["mlp.router.weight"],
        ["model.layers.0.mlp.experts.down_proj"],
        "down_proj",
        [1],
        [["down_proj"]],
    ):
        file.write_text(json.dumps({**content, "target_parameters": parameters}))
        with pytest.raises(UserError, match=r"adapter_config.json: target_parameters is .*: supported are mlp.experts"):
            read_lora(path)
    file.write_text(json.dumps({**content, "target_modules": "all-linear"}))
    with pytest.raises(UserError, match="target_modules is all-linear beside target_parameters: name the modules"):
        read_lora(path)
    with pytest.raises(UserError, match="name all of gate_proj, up_proj or none"):
        check_adapter(path, Lora(3, 5.0, ("q_proj", "up_proj")), hf_config)
    file.write_text(json.dumps(content))
    tensors = load_file(path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.experts.1.gate_proj.lora_A.weight"
    save_file({**tensors, name: torch.zeros(3, 32)}, path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"experts.1.gate_proj.lora_A.weight is an adapter of one expert's linear") as e:
        check_adapter(path, read_lora(path), hf_config)
    assert "\n" not in str(e.value)
