"""A layout that does not divide is refused with those that do."""

from pathlib import Path

import pytest
from transformers import PretrainedConfig

from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.divisibility import check_layout
from megatron_tgdpo.models.hf_config import read_hf_config
from tests.published_configs import PUBLISHED, write_config


def nine_heads(path: Path, **changes: int) -> PretrainedConfig:
    """The sizes of SmolLM2-135M."""
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "intermediate_size": 1536}
    values = {**PUBLISHED["Llama-3-8B"], **sizes, "num_hidden_layers": 30, **changes}
    path.mkdir(parents=True)
    return read_hf_config(write_config(path, values))


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ((2, 1, 1), "model.policy: 9 attention heads are not divisible by parallel.tensor = 2: set parallel.tensor to "
                    "1 or 3"),
        # The MLP has no ninths.
        ((9, 1, 1), "model.policy: MLP size 1536 is not divisible by parallel.tensor = 9: set parallel.tensor to 1 or "
                    "3"),
        ((1, 31, 1), "model.policy: 30 layers are fewer than parallel.pipeline = 31 stages: set parallel.pipeline to "
                    "at most 30"),
        ((1, 8, 4), "model.policy: 30 layers are fewer than parallel.pipeline x virtual_pipeline = 8 x 4: set "
                    "parallel.virtual_pipeline to at most 3"),
    ],
)  # fmt: skip
def test_what_divides_is_named(tmp_path: Path, layout: tuple[int, int, int], expected: str) -> None:
    tensor, pipeline, virtual = layout
    with pytest.raises(UserError) as refused:
        check_layout(
            {"policy": nine_heads(tmp_path / "model")},
            make_layout(tensor, pipeline, 1, False, tensor * pipeline, virtual),
        )
    assert str(refused.value) == expected


def test_what_is_named_divides_every_model(tmp_path: Path) -> None:
    models = {
        "policy": nine_heads(tmp_path / "policy", intermediate_size=1152),
        "guide": nine_heads(tmp_path / "guide", num_hidden_layers=20),
    }
    with pytest.raises(UserError, match=r"^model\.guide: 20 layers .* set parallel\.pipeline to at most 20$"):
        check_layout(models, make_layout(1, 24, 1, False, 24))
    with pytest.raises(UserError, match=r"^model\.guide: MLP size .* set parallel\.tensor to 1 or 3$"):
        check_layout(models, make_layout(9, 1, 1, False, 9))
    check_layout(models, make_layout(3, 10, 1, False, 30))
