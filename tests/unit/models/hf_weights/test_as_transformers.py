"""Model directories as people have them: each is read as transformers reads it, or refused with the reason.

Every tensor that is read is compared with transformers' own model, loaded from the same directory.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints_convert.import_hf import _common_dtype
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.check import open_hf
from megatron_tgdpo.models.hf_weights.mapping import expected_shapes
from tests.tiny_models import FAMILY_OPTIONS, make_llama, make_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# transformers 4 leaves random what it finds under a name that it does not look for.
SINCE_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 does not read it")
Tensors = dict[str, Tensor]
Edit = Callable[[Tensors], Tensors]


def rewritten(path: Path, edit: Edit) -> Path:
    tensors = {name: tensor.clone() for name, tensor in edit(load_file(path / SINGLE)).items()}
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    return path


def configured(path: Path, **values: Any) -> Path:
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps(config))
    return path


def read(path: Path) -> Tensors:
    """What this project reads, in fp32."""
    hf_config = read_hf_config(path)
    checkpoint = open_hf(path, hf_config)
    return {name: checkpoint.whole(name).float() for name in expected_shapes(hf_config)}


def assert_as_transformers(path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    theirs, ours = model.state_dict(), read(path)
    assert theirs.keys() - ours.keys() <= {HEAD}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if HEAD not in ours:
        assert torch.equal(ours[EMBEDDING], theirs[HEAD])


def test_the_single_file_wins_over_an_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """``save_pretrained`` into a directory that was saved in shards leaves the index, with or without the shards."""
    path = make_llama(tmp_path / "model", layers=2, seed=1)
    other = make_llama(tmp_path / "other", layers=2, seed=2, max_shard_size="60KB")
    for file in [*other.glob("model-*.safetensors"), other / INDEX]:
        (path / file.name).write_bytes(file.read_bytes())
    assert_as_transformers(path)
    assert "model.safetensors is read, as transformers does" in caplog.text
    for file in path.glob("model-*.safetensors"):
        file.unlink()
    assert_as_transformers(path)


@pytest.mark.parametrize("family", FAMILY_OPTIONS)
def test_buffers_are_no_weights(tmp_path: Path, family: str) -> None:
    """In any family, spelling and dtype; and they do not decide in which dtype an import stores the weights."""
    path = make_model(tmp_path, family, layers=2, dtype=torch.bfloat16)
    buffers = {
        "model.rotary_emb.inv_freq": torch.ones(8),
        "rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64),
        "model.rotary_emb.original_inv_freq": torch.ones(8),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.1.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 4, 8),
        "model.layers.1.self_attn.masked_bias": torch.tensor(-1e9),
        "model.layers.0.self_attn.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "model.embeddings.position_ids": torch.arange(4)[None],
        "model.layers.0.self_attn._extra_state": torch.zeros(0, dtype=torch.uint8),
    }
    assert_as_transformers(rewritten(path, lambda tensors: tensors | buffers))
    hf_config = read_hf_config(path)
    assert _common_dtype(open_hf(path, hf_config), hf_config) == torch.bfloat16
    rewritten(path, lambda tensors: tensors | {"model.layers.0.self_attn.q_proj.bias_scale": torch.ones(1)})
    with pytest.raises(UserError, match=r"q_proj.bias_scale not expected"):
        read(path)


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def with_second_prefix(tensors: Tensors) -> Tensors:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("edit", [without_prefix, pytest.param(with_second_prefix, marks=SINCE_5)])
@pytest.mark.parametrize("tied", [True, False])
def test_prefixes(tmp_path: Path, edit: Edit, tied: bool) -> None:
    assert_as_transformers(rewritten(make_llama(tmp_path, layers=2, tied=tied), edit))


def test_the_model_without_its_head(tmp_path: Path) -> None:
    """``LlamaModel.save_pretrained``: all of a tied model is there; of another the head is missing."""
    path = make_llama(tmp_path / "llama", layers=2, tied=True)
    base = AutoModelForCausalLM.from_pretrained(path).model
    base.save_pretrained(path)
    assert json.loads((path / "config.json").read_text())["architectures"] == ["LlamaModel"]
    assert EMBEDDING not in load_file(path / SINGLE)
    assert_as_transformers(path)
    with pytest.raises(UserError, match=r"lm_head\.weight missing"):
        read(configured(path, tie_word_embeddings=False))


@pytest.mark.parametrize("family", FAMILY_OPTIONS)
def test_architectures_follow_from_the_model_type(tmp_path: Path, family: str) -> None:
    assert_as_transformers(configured(make_model(tmp_path, family, layers=2), architectures=None))


def test_dtypes_may_be_mixed(tmp_path: Path) -> None:
    path = make_llama(tmp_path, layers=2, dtype=torch.bfloat16)
    rewritten(path, lambda tensors: {n: t.float() * 1.001 if "norm" in n else t for n, t in tensors.items()})
    assert_as_transformers(path)
    hf_config = read_hf_config(path)
    assert _common_dtype(open_hf(path, hf_config), hf_config) == torch.float32


TIED: dict[str, Edit] = {
    "twice": lambda tensors: tensors | {HEAD: tensors[EMBEDDING]},
    "twice, the head in fp32": lambda tensors: tensors | {HEAD: tensors[EMBEDDING].float()},
    "twice, the embedding in fp32": lambda t: t | {HEAD: t[EMBEDDING], EMBEDDING: t[EMBEDDING].float()},
    # safetensors' own save_model keeps the first name.
    "as the head": lambda t: {name: x for name, x in (t | {HEAD: t[EMBEDDING]}).items() if name != EMBEDDING},
}


@pytest.mark.parametrize("how", [pytest.param(how, marks=SINCE_5) if how == "as the head" else how for how in TIED])
def test_tied_embeddings_stored(tmp_path: Path, how: str) -> None:
    assert_as_transformers(rewritten(make_llama(tmp_path, layers=2, tied=True, dtype=torch.bfloat16), TIED[how]))


def test_the_head_is_no_embedding_of_an_untied_model(tmp_path: Path) -> None:
    path = make_llama(tmp_path, layers=2)
    rewritten(path, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != EMBEDDING})
    with pytest.raises(UserError, match=r"embed_tokens\.weight missing"):
        read(path)


def test_a_tied_head_with_other_digits(tmp_path: Path) -> None:
    """transformers would not tie them in fp32, and would in bf16."""
    path = make_llama(tmp_path, layers=2, tied=True)
    rewritten(path, lambda tensors: tensors | {HEAD: tensors[EMBEDDING].bfloat16()})
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        read(path)


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    path = make_llama(tmp_path, layers=2)
    rewritten(path, lambda tensors: tensors | {"norm.weight": torch.ones(64)})
    with pytest.raises(UserError, match=r"model.norm.weight is there twice, with and without the prefix 'model.'"):
        read(path)
