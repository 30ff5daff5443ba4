"""Which layer spec and core attention is taken where."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.gpu import capabilities, options
from megatron_tgdpo.gpu.capabilities import Capabilities
from megatron_tgdpo.gpu.kernel_choice import (
    ATTENTION_BACKENDS,
    choose_attention,
    choose_layer_spec,
    core_attention_spec,
)
from megatron_tgdpo.models.attention.base import PackedAttention
from megatron_tgdpo.models.config import LanguageModelConfig, transformer_config_kwargs
from megatron_tgdpo.models.hf_config import read_hf_config
from tests.tiny_models import DENSE_OPTIONS, EXPERT_OPTIONS, make_model
from tests.unit.config.test_loading import VALID

CPU = Capabilities("cpu")
HOPPER = Capabilities("cuda", (9, 0), (12, 9), (2, 11, 0), cudnn=(9, 19, 0), varlen=True)


@pytest.mark.parametrize(
    ("requested", "found", "wanted"),
    [
        ("auto", CPU, "local"),
        ("local", HOPPER, "local"),
        ("auto", HOPPER, "transformer_engine"),
        ("transformer_engine", HOPPER, "transformer_engine"),
        ("auto", replace(HOPPER, transformer_engine=None), "local"),
        ("auto", replace(HOPPER, transformer_engine=(2, 8, 0)), "local"),
        ("auto", replace(HOPPER, transformer_engine=(2, 9, 0)), "transformer_engine"),
        ("auto", replace(HOPPER, transformer_engine=(2, 99, 0)), "transformer_engine"),
    ],
)
def test_layer_spec(requested: str, found: Capabilities, wanted: str) -> None:
    assert choose_layer_spec(requested, found) == wanted


@pytest.mark.parametrize("requested", ["auto", "transformer_engine"])
def test_a_broken_transformer_engine_is_not_taken_for_none(requested: str) -> None:
    broken = replace(HOPPER, transformer_engine=None, transformer_engine_error="OSError: libcudart.so.13: no such file")
    with pytest.raises(UserError, match=r"libcudart.so.13.*model.layer_spec=local"):
        choose_layer_spec(requested, broken)
    assert choose_layer_spec("local", broken) == "local"


@pytest.mark.parametrize(
    ("module", "wanted"), [("raise OSError('libcudart.so.13')", "OSError: libcudart.so.13"), (None, "")]
)
def test_why_transformer_engine_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str | None, wanted: str
) -> None:
    if module is not None:
        (tmp_path / "transformer_engine").mkdir()
        (tmp_path / "transformer_engine" / "__init__.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    assert capabilities._transformer_engine() == (None, wanted)


def test_fp32_is_not_computed_in_tf32() -> None:
    """Transformer Engine's fp32 products are TF32: its layers are taken where they are asked for alone."""
    assert choose_layer_spec("auto", HOPPER, "fp32") == "local"
    assert choose_layer_spec("transformer_engine", HOPPER, "fp32") == "transformer_engine"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (CPU, "needs a CUDA GPU"),
        (replace(HOPPER, transformer_engine=None), "found none"),
        (replace(HOPPER, transformer_engine=(2, 8, 0)), r">=2\.9, found 2\.8\.0"),
    ],
)
def test_transformer_engine_where_it_is_not_usable(found: Capabilities, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_layer_spec("transformer_engine", found)


def config(**options: Any) -> LanguageModelConfig:
    arguments = {"num_layers": 2, "hidden_size": 512, "num_attention_heads": 4, "params_dtype": torch.bfloat16}
    return LanguageModelConfig(**{**arguments, "bf16": True, **options})


CAP, WINDOW, SINKS = {"attn_logit_softcapping": 50.0}, {"window_size": (4095, 0)}, {"softmax_type": "learnable"}


@pytest.mark.parametrize(
    ("options", "spec", "found", "wanted"),
    [
        ({}, "transformer_engine", HOPPER, "transformer_engine"),
        (WINDOW, "transformer_engine", HOPPER, "transformer_engine"),
        ({}, "local", HOPPER, "varlen"),
        ({}, "local", replace(HOPPER, varlen=False), "flex"),
        ({}, "local", CPU, "blocks"),
        (CAP, "transformer_engine", HOPPER, "flex"),
        (CAP, "local", HOPPER, "flex"),
        (CAP, "local", CPU, "blocks"),
        (SINKS, "transformer_engine", HOPPER, "flex"),
        ({"bf16": False, **SINKS}, "local", HOPPER, "flex"),
        (SINKS, "local", CPU, "blocks"),
        ({"bf16": False}, "local", HOPPER, "blocks"),
        ({"bf16": False, **WINDOW}, "local", HOPPER, "flex"),
        ({"kv_channels": 36}, "local", HOPPER, "blocks"),
        # cuDNN too old or broken, or the wrong GPU for it: flash-attn if it is there, else torch's.
        ({}, "transformer_engine", replace(HOPPER, cudnn=(9, 5, 0)), "varlen"),
        ({}, "transformer_engine", replace(HOPPER, cudnn=(9, 10, 1)), "varlen"),
        (WINDOW, "transformer_engine", replace(HOPPER, cudnn=(9, 14, 0)), "varlen"),
        ({}, "transformer_engine", replace(HOPPER, cudnn=(9, 14, 0)), "transformer_engine"),
        ({}, "transformer_engine", replace(HOPPER, compute_capability=(8, 0)), "varlen"),
        ({}, "transformer_engine", replace(HOPPER, compute_capability=(12, 0)), "varlen"),
        ({}, "transformer_engine", replace(HOPPER, compute_capability=(8, 0), flash_attn=True), "transformer_engine"),
        ({"kv_channels": 256}, "transformer_engine", HOPPER, "transformer_engine"),
        ({"kv_channels": 256}, "transformer_engine", replace(HOPPER, compute_capability=(10, 0)), "varlen"),
    ],
)
def test_core_attention(options: dict, spec: Any, found: Capabilities, wanted: str) -> None:
    assert choose_attention(config(**options), spec, found) == wanted


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_every_backend_is_there(backend: str) -> None:
    assert issubclass(core_attention_spec(backend).module, PackedAttention)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [*DENSE_OPTIONS, *EXPERT_OPTIONS])
def test_every_family_is_built_with_the_fused_kernels_of_a_gpu(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-OSS's config names SiLU, which its experts do not have: megatron-core refuses to fuse it."""
    hf = make_model(tmp_path, family, layers=2, weights=False)
    monkeypatch.setattr(options, "capabilities", lambda device: HOPPER)
    config = config_from_dict({**VALID, "model": {"policy": str(hf), "layer_spec": "local"}, "loss": {"method": "dpo"}})
    hf_config = read_hf_config(hf)
    overrides, _ = options.model_options(config, hf_config, torch.device("cuda"), frozen=False)
    layout = make_layout(1, 1, 1, False, 1)
    kwargs = transformer_config_kwargs(
        hf_config, layout, dtype=torch.bfloat16, device=torch.device("cpu"), overrides=overrides
    )
    built = LanguageModelConfig(**kwargs)
    assert built.bias_activation_fusion == (family not in ("gpt_oss", "gemma2", "gemma3_text", "vaultgemma"))
