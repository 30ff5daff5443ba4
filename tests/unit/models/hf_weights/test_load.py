"""Contradictions that only loading can see."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.load import load_hf_weights, refuse_non_finite
from megatron_tgdpo.models.language_model import LanguageModel
from tests.tiny_models import make_llama


class FirstRank:
    """A tensor group of which this is rank 0."""

    def rank(self) -> int:
        return 0


def load(path: Path) -> torch.nn.Module:
    """Loads into a model that has nothing but an embedding."""
    model = torch.nn.Module()
    model.embedding = torch.nn.Module()
    model.embedding.word_embeddings = torch.nn.Embedding(256, 64)
    pg: Any = SimpleNamespace(tp=FirstRank())
    load_hf_weights(cast(LanguageModel, model), path, read_hf_config(path), pg)
    return model


def add_head(path: Path, difference: float) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    head[130, 63] += difference
    save_file({**tensors, "lm_head.weight": head}, file, metadata={"format": "pt"})


def test_tied_model_may_repeat_its_embedding(tmp_path: Path) -> None:
    path = make_llama(tmp_path, tied=True)
    add_head(path, 0.0)
    loaded = load(path).get_parameter("embedding.word_embeddings.weight")
    assert torch.equal(loaded[:131], load_file(path / "model.safetensors")["model.embed_tokens.weight"])
    assert not loaded[131:].any()


def test_tied_model_with_another_head_is_refused(tmp_path: Path) -> None:
    path = make_llama(tmp_path, tied=True)
    add_head(path, 1e-3)
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    path = make_llama(tmp_path, tied=True)
    model = cast(LanguageModel, load(path))
    refuse_non_finite([model], path, read_hf_config(path))
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][7, 3] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model = cast(LanguageModel, load(path))
    with pytest.raises(UserError, match=r"model.embed_tokens.weight has values that are not finite: get or make"):
        refuse_non_finite([model], path, read_hf_config(path))


def test_weights_beyond_a_runs_dtype(tmp_path: Path) -> None:
    path = make_llama(tmp_path, tied=True)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][7, 3] = 70000.0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model = cast(LanguageModel, load(path).half())
    with pytest.raises(UserError, match=r"embed_tokens.weight has values beyond what float16 holds"):
        refuse_non_finite([model], path, read_hf_config(path))


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "hf")
    hf_config = read_hf_config(path)
    pg: Any = SimpleNamespace(tp=FirstRank())
    with pytest.raises(UserError, match="no such directory"):
        load_hf_weights(cast(LanguageModel, torch.nn.Module()), tmp_path / "nowhere", hf_config, pg)
