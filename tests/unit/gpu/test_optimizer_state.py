"""Moments and main weights in fewer bytes: what is refused, what megatron-core is told, and remainders to the bit."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.schema import OptimizerSettings
from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.gpu.capabilities import Capabilities
from megatron_tgdpo.gpu.optimizer_state import check_optimizer_state, optimizer_state_kwargs, state_bytes
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.planning.activations import Pack
from megatron_tgdpo.planning.memory import rank_memory
from megatron_tgdpo.training.sharded_optimizer_state import remainder, whole_weight
from tests.published_configs import PUBLISHED, write_config
from tests.unit.config.test_loading import VALID

HOPPER = Capabilities(device="cuda", compute_capability=(9, 0), transformer_engine=(2, 11), adam="transformer_engine")


@pytest.mark.parametrize(
    ("sections", "found", "message"),
    [
        ({}, Capabilities("cpu"), None),
        (
            {"optimizer": {"moments": "bf16"}},
            Capabilities("cpu"),
            "moments=bf16 is what Transformer Engine's Adam does",
        ),
        (
            {"optimizer": {"main_weights": "remainder"}},
            dataclasses.replace(HOPPER, adam="apex"),
            r"here it would be apex's on cuda: set optimizer.main_weights=fp32",
        ),
        ({"optimizer": {"moments": "fp8", "main_weights": "remainder"}}, HOPPER, None),
        ({"optimizer": {"moments": "bf16"}, "train": {"steps": 1, "fused": "off"}}, HOPPER, "set it to auto"),
        ({"optimizer": {"moments": "bf16"}, "offload": {"optimizer": 1.0}}, HOPPER, "whose state is fp32"),
        ({"optimizer": {"main_weights": "remainder"}, "precision": {"dtype": "fp32"}}, HOPPER, "rest of bf16 weights"),
        ({"optimizer": {"moments": "bf16"}, "precision": {"dtype": "fp32"}}, HOPPER, "would keep fp32 copies"),
        (
            {"optimizer": {"main_weights": "remainder"}, "precision": {"fp8": "tensorwise"}},
            HOPPER,
            "megatron-core keeps whole fp32",
        ),
        ({"optimizer": {"moments": "fp8"}, "precision": {"fp8": "blockwise"}}, HOPPER, "without their scales"),
        ({"optimizer": {"moments": "bf16"}, "precision": {"fp8": "blockwise"}}, HOPPER, None),
    ],
)
def test_what_is_refused(sections: dict[str, Any], found: Capabilities, message: str | None) -> None:
    config = config_from_dict(
        {**VALID, **sections, "optimizer": {**VALID["optimizer"], **sections.get("optimizer", {})}}
    )
    if message is None:
        check_optimizer_state(config, found)
        return
    with pytest.raises(UserError, match=message):
        check_optimizer_state(config, found)


def test_megatron_core_takes_what_it_is_told() -> None:
    """By its own names; it looks for Transformer Engine when it makes the config, so that it is not made here."""
    kwargs = optimizer_state_kwargs(OptimizerSettings(lr=1.0, moments="fp8", main_weights="remainder"))
    assert kwargs == {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": torch.uint8,
        "exp_avg_sq_dtype": torch.bfloat16,
        "store_param_remainders": True,
    }
    assert kwargs.keys() <= {field.name for field in dataclasses.fields(OptimizerConfig)}
    assert optimizer_state_kwargs(OptimizerSettings(lr=1.0)) == {}


def test_a_weight_and_its_remainder_are_the_whole() -> None:
    whole = torch.cat(
        [torch.randn(10_000, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, -0.0, 1e-42])]
    )
    bits = whole.view(torch.int32)
    low = (bits & 0xFFFF).to(torch.int16)
    # As Transformer Engine's kernel splits it.
    weight = ((bits >> 16) + (low < 0)).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(remainder(weight, whole), low)
    assert torch.equal(whole_weight(weight, low).view(torch.int32), bits)
    # Beside weights that PyTorch rounded, as a checkpoint of fp32 main weights has them: half ways go to even.
    rounded = whole.bfloat16()
    again = whole_weight(rounded, remainder(rounded, whole))
    assert (again.view(torch.int32) - bits).abs().max() <= 1
    half = torch.tensor([0x3F808000], dtype=torch.int32).view(torch.float32)
    assert (whole_weight(half.bfloat16(), remainder(half.bfloat16(), half)) - half).abs() == 2**-23


@pytest.mark.parametrize(
    ("moments", "main", "wanted"), [("fp32", "fp32", 12), ("bf16", "remainder", 6), ("fp8", "fp32", 7)]
)
def test_plans_count_it(moments: str, main: str, wanted: int, tmp_path: Path) -> None:
    settings = {**VALID["optimizer"], "moments": moments, "main_weights": main}
    config, layout = config_from_dict({**VALID, "optimizer": settings}), make_layout(1, 1, 1, False, 1)
    model = read_hf_config(write_config(tmp_path, PUBLISHED["Llama-3.2-3B"]))
    plan = rank_memory(model, [], layout, Pack(4096, 2048, 2, 0.0, 0), "full", state_bytes=state_bytes(config))
    assert plan.optimizer == wanted * plan.policy_parameters
