"""Modules that a policy's layers have not are refused, where megatron-core would pass them over or fail."""

from pathlib import Path

import pytest

from megatron_tgdpo.config.constraints import RECOMPUTE_MODULES
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.planning.recomputation import check_recompute, recompute_keys, recompute_kwargs
from tests.tiny_models import MIXED_OPTIONS, make_model


@pytest.mark.parametrize(
    ("family", "spec", "refused"),
    [
        ("llama", "local", {"moe": "choose mlp", "shared_experts": "choose mlp"}),
        ("llama", "transformer_engine", {"moe": "no experts", "shared_experts": "no experts", "layernorm": "inside"}),
        (
            "olmo2",
            "local",
            {"moe": "no experts", "shared_experts": "no experts", "layernorm": "norms before attention"},
        ),
        ("mixtral", "transformer_engine", {"mlp": "choose moe", "shared_experts": "and model.policy none: choose moe"}),
        ("qwen2_moe", "local", {"mlp": "choose moe, or shared_experts"}),
        ("qwen2_moe-mixed", "transformer_engine", {}),
    ],
)
def test_what_the_layers_have_not_is_refused(tmp_path: Path, family: str, spec: str, refused: dict[str, str]) -> None:
    options = MIXED_OPTIONS.get(family, {"family": family})
    hf_config = read_hf_config(make_model(tmp_path, layers=2, **options))
    for module in RECOMPUTE_MODULES:
        if module not in refused:
            check_recompute(module, hf_config, spec)
            continue
        with pytest.raises(UserError, match=rf"^train.recompute_modules has {module}, .*{refused[module]}"):
            check_recompute(module, hf_config, spec)


def test_norms_on_a_gpu_without_transformer_engine(tmp_path: Path) -> None:
    hf_config = read_hf_config(make_model(tmp_path, layers=1))
    with pytest.raises(UserError, match="has layernorm, for which megatron-core needs Transformer Engine"):
        check_recompute("layernorm,mlp", hf_config, "local", can_discard=False)
    check_recompute("mlp", hf_config, "local", can_discard=False)


def test_keys_and_arguments() -> None:
    assert recompute_keys("full") == {"recompute": "full"}
    assert recompute_keys("mlp,layernorm") == {"recompute": "selective", "recompute_modules": ["mlp", "layernorm"]}
    assert recompute_kwargs("none") == {}
    assert recompute_kwargs("full")["recompute_granularity"] == "full"
    selective = {"recompute_granularity": "selective"}
    assert recompute_kwargs("selective") == {**selective, "recompute_modules": ["core_attn"]}
    assert recompute_kwargs("mlp,layernorm") == {**selective, "recompute_modules": ["layernorm", "mlp"]}
