"""What a config must satisfy before a model is built from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from megatron_tgdpo.checkpoints.manifest import write_manifest
from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.config import transformer_config_kwargs
from megatron_tgdpo.models.hf_config import padded_vocab_size, read_hf_config
from megatron_tgdpo.storage.files import file_digest
from tests.tiny_models import make_llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("hf"), heads=6, kv_heads=2, hidden_size=48, layers=6)


def changed(hf: Path, tmp_path: Path, **changes: Any) -> Path:
    config = json.loads((hf / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    return tmp_path


def kwargs(hf: Path, tensor: int, pipeline: int, sequence_parallel: bool = False, **overrides: Any) -> dict[str, Any]:
    layout = make_layout(tensor, pipeline, 1, sequence_parallel, tensor * pipeline)
    return transformer_config_kwargs(read_hf_config(hf), layout, dtype=torch.bfloat16, device=CPU, overrides=overrides)


def test_reads_the_config_of_a_megatron_checkpoint(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text((hf / "config.json").read_text())
    write_manifest(tmp_path, {}, {"hf/config.json": file_digest(tmp_path / "hf" / "config.json")})
    ours, theirs = read_hf_config(tmp_path).to_dict(), read_hf_config(hf).to_dict()
    assert ours.pop("_name_or_path", None) != theirs.pop("_name_or_path", "")
    assert ours == theirs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"architectures is \['GPT2LMHeadModel'\]"),
        ({"architectures": None, "model_type": "gpt2"}, r"architectures is \['GPT2LMHeadModel'\]"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures is \['LlamaForSequenceClass"),
        ({"model_type": "mistral"}, r"architectures is \['LlamaForCausalLM'\], but model_type is 'mistral'"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights is 'other.safetensors'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "su", "factor": 2.0}}, "'su'"),
    ],
)
def test_what_would_change_the_maths_is_refused(hf: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_hf_config(changed(hf, tmp_path, **changes))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_malformed_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config\\.json there"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a readable HF config"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not a readable HF config"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "message"),
    [
        (1, 4, "6 layers are not divisible by parallel.pipeline = 4"),
        (4, 1, "6 attention heads are not divisible by parallel.tensor = 4"),
        (3, 1, "2 key/value heads neither divide nor are divisible by parallel.tensor = 3"),
    ],
)
def test_layouts_that_do_not_divide_are_refused(hf: Path, tensor: int, pipeline: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        kwargs(hf, tensor, pipeline)


def test_mlp_size_must_divide(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"MLP size 97 is not divisible by parallel.tensor = 2"):
        kwargs(changed(hf, tmp_path, intermediate_size=97), 2, 1)


def test_transformer_config_follows_config_and_layout(hf: Path) -> None:
    made = kwargs(hf, 2, 3, True, recompute_granularity="selective")
    wanted = {
        "num_layers": 6,
        "hidden_size": 48,
        "ffn_hidden_size": 96,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 8,
        "layernorm_epsilon": AutoConfig.from_pretrained(hf).rms_norm_eps,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 3,
        "sequence_parallel": True,
        "params_dtype": torch.bfloat16,
        "bf16": True,
        "calculate_per_token_loss": True,
        "recompute_granularity": "selective",
    }
    assert {key: made[key] for key in wanted} == wanted


@pytest.mark.parametrize(("tensor", "rows"), [(1, 256), (2, 256), (8, 256), (3, 384)])
def test_vocabulary_is_padded_alike_for_usual_layouts(hf: Path, tensor: int, rows: int) -> None:
    assert padded_vocab_size(read_hf_config(hf), tensor) == rows
