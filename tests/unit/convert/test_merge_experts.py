"""Adapters of experts: what PEFT makes of a directory is what a merge makes of it."""

import copy
from pathlib import Path

import pytest
import torch

from checkpoints_convert.merge import merged, read_base_model
from checkpoints_convert.pieces import all_pieces
from megatron_tgdpo.checkpoints.adapter_directory import read_lora
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.adapter_layout import read_adapter
from tests import reference
from tests.tiny_models import make_model

peft = pytest.importorskip("peft", minversion="0.18")
pytest.importorskip("transformers", minversion="5")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_streamed_merge_is_that_of_peft(tmp_path: Path, family: str) -> None:
    base = make_model(tmp_path / "base", family, layers=2)
    model, seed = reference.load(base), torch.Generator().manual_seed(3)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=seed)
    adapted.save_pretrained(tmp_path / "adapter")
    # In files of either version of transformers each expert has tensors of its own.
    expected = adapted.merge_and_unload()
    expected.save_pretrained(tmp_path / "expected")

    hf_config, lora = read_hf_config(base), read_lora(tmp_path / "adapter")
    tensors = read_adapter(tmp_path / "adapter", lora, hf_config)
    reads = (
        merged(read_base_model(base, hf_config), tensors, lora, hf_config),
        read_base_model(tmp_path / "expected", hf_config),
        read_base_model(base, hf_config),
    )
    changed = set()
    for piece in all_pieces(hf_config, 4):
        for (name, _, ours), (_, _, theirs), (_, _, before) in zip(*(read(piece) for read in reads), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
            if not torch.equal(ours, before):
                changed.add(name.split(".layers.")[1][2:])
    assert len([name for name in changed if ".experts.3." in name]) == 3
    assert not any("gate.weight" in name for name in changed), "a router has no adapter"
