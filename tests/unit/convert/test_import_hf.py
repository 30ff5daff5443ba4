"""HF to Megatron without a model: what is written, and what is refused."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.planner import SavePlan

from checkpoints_convert import pieces
from checkpoints_convert.compare_weights import different_weights
from checkpoints_convert.import_hf import _StreamWriter, import_hf
from megatron_tgdpo.checkpoints.manifest import read_metadata
from megatron_tgdpo.checkpoints.reader import CheckpointReader
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.mapping import EMBEDDING
from tests.checkpoints import is_complete
from tests.launch import ROOT, environment
from tests.tiny_models import make_llama

pytestmark = pytest.mark.usefixtures("one_rank")

Tensors = dict[str, torch.Tensor]


def rewrite(path: Path, change: Callable[[Tensors], object]) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_rank_without_pieces_writes_no_file(tmp_path: Path) -> None:
    plan = SavePlan([], storage_data=_StoragePrefix("__1_"))
    done = _StreamWriter(tmp_path, mock.Mock()).write_data(plan, mock.Mock())
    assert done.wait() == []
    assert not list(tmp_path.iterdir())


def convert(hf: Path, out: Path, dtype: torch.dtype | None = None) -> None:
    import_hf(hf, out, read_hf_config(hf), dtype)


def assert_same(hf: Path, out: Path, dtype: torch.dtype) -> None:
    assert different_weights(hf, out, read_hf_config(out), dtype) == []


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "hf", layers=2)


def test_pieces_change_nothing_but_the_chunks(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(hf, tmp_path / "whole")
    # 7 rows of 64 fp32 values: no piece ends where a tensor or the vocabulary does.
    monkeypatch.setattr(pieces, "PIECE_BYTES", 7 * 64 * 4)
    convert(hf, tmp_path / "pieces")
    whole, parts = (CheckpointReader(tmp_path / name) for name in ("whole", "pieces"))
    assert whole.tensors.keys() == parts.tensors.keys()
    for key, info in whole.tensors.items():
        layers = range(info.size[0]) if key.startswith("decoder.layers") else [None]
        for layer in layers:
            rows = info.size[0] if layer is None else info.size[1]
            assert torch.equal(whole.rows(key, layer, 0, rows), parts.rows(key, layer, 0, rows)), key
    assert len(parts.tensors["output_layer.weight"].chunks) == 37  # 256 rows
    assert_same(hf, tmp_path / "pieces", torch.float32)
    embedding = parts.rows(EMBEDDING, None, 0, 256)
    assert torch.equal(embedding[:131], load_file(hf / "model.safetensors")["model.embed_tokens.weight"])
    assert not embedding[131:].any()


def test_default_loader_of_megatron_core_reads_it(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    monkeypatch.setattr(pieces, "PIECE_BYTES", 7 * 64 * 4)
    convert(hf, tmp_path / "out")
    reader = CheckpointReader(tmp_path / "out")
    keys = (
        "embedding.word_embeddings.weight",
        "decoder.layers.mlp.linear_fc1.weight",
        "decoder.final_layernorm.weight",
    )
    wanted = {key: ShardedTensor.from_rank_offsets(key, torch.zeros(reader.tensors[key].size)) for key in keys}
    loaded = dist_checkpointing.load(wanted, str(tmp_path / "out"))
    source = load_file(hf / "model.safetensors")
    assert torch.equal(loaded[keys[0]][:131], source["model.embed_tokens.weight"])
    mlp = [source[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(loaded[keys[1]][1], torch.cat(mlp))
    assert torch.equal(loaded[keys[2]], source["model.norm.weight"])


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_stored_dtype_is_kept(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    hf = make_llama(tmp_path / "hf", layers=1, dtype=dtype)
    convert(hf, tmp_path / "out")
    assert read_metadata(tmp_path / "out")["dtype"] == name
    assert_same(hf, tmp_path / "out", dtype)


def test_several_dtypes_become_fp32(hf: Path, tmp_path: Path) -> None:
    rewrite(hf, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].half()}))
    convert(hf, tmp_path / "out")
    assert read_metadata(tmp_path / "out")["dtype"] == "fp32"
    assert_same(hf, tmp_path / "out", torch.float32)


def test_values_that_fp16_cannot_hold(hf: Path, tmp_path: Path) -> None:
    rewrite(hf, lambda tensors: tensors["model.norm.weight"][5].fill_(1e5))
    with pytest.raises(UserError, match=r"decoder.final_layernorm.weight: has values beyond what fp16 holds"):
        convert(hf, tmp_path / "out", torch.float16)
    convert(hf, tmp_path / "out", torch.bfloat16)


def test_one_changed_value_is_found(hf: Path, tmp_path: Path) -> None:
    convert(hf, tmp_path / "out")
    rewrite(hf, lambda tensors: tensors["model.layers.1.self_attn.k_proj.weight"][3, 4].add_(1e-6))
    config = read_hf_config(hf)
    assert different_weights(hf, tmp_path / "out", config, torch.float32) == ["model.layers.1.self_attn.k_proj.weight"]
    rewrite(hf, lambda tensors: tensors.pop("model.norm.weight"))
    assert "model.norm.weight" in different_weights(hf, tmp_path / "out", config, torch.float32)


def test_tied_model_with_another_head_is_refused(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", layers=1, tied=True)
    rewrite(hf, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    convert(hf, tmp_path / "out")
    rewrite(hf, lambda tensors: tensors["lm_head.weight"][130, 63].add_(1e-3))
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        convert(hf, tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight missing, config.json asks"),
        (lambda tensors: tensors.update(new=torch.zeros(3)), "tensor new not expected"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65)}),
            r"model.norm.weight has shape \[65\] in model.safetensors, config.json asks for \[64\]",
        ),
    ],
)
def test_other_weights_than_the_config_says(
    hf: Path, tmp_path: Path, change: Callable[[Tensors], object], message: str
) -> None:
    rewrite(hf, change)
    with pytest.raises(UserError, match=message):
        convert(hf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 3), ("vocab_size", 100), ("intermediate_size", 128)])
def test_config_that_lies(hf: Path, tmp_path: Path, key: str, value: int) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=r"config.json asks for"):
        convert(hf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tied_embedding_under_the_name_of_the_head(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", tied=True, layers=2)
    rewrite(hf, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    convert(hf, tmp_path / "out")
    assert_same(hf, tmp_path / "out", torch.float32)
    stored = CheckpointReader(tmp_path / "out").rows(EMBEDDING, None, 0, 131)
    assert torch.equal(stored, load_file(hf / "model.safetensors")["lm_head.weight"])


def test_a_linked_tokenizer_is_refused_before_the_work(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (hf / "tokenizer.json").unlink()
    (hf / "tokenizer.json").symlink_to(tmp_path / "secret")
    with (
        mock.patch("checkpoints_convert.import_hf.open_hf", side_effect=AssertionError),
        pytest.raises(UserError, match=r"tokenizer.json: a link to .*/secret"),
    ):
        convert(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_are_read_through_links_and_their_files_not_passed_on(hf: Path, tmp_path: Path) -> None:
    """People keep weights in a store; nothing but tensors of the model comes out of them."""
    store = tmp_path / "store"
    store.mkdir()
    tensors = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").rename(store / "blob")
    (hf / "model.safetensors").symlink_to(store / "blob")
    (tmp_path / "id_rsa").write_text("a private key")
    (hf / "notes.txt").symlink_to(tmp_path / "id_rsa")
    convert(hf, tmp_path / "out")
    stored = CheckpointReader(tmp_path / "out").rows(EMBEDDING, None, 0, 131)
    assert torch.equal(stored, tensors["model.embed_tokens.weight"])
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(path.is_symlink() or b"a private key" in path.read_bytes() for path in written)
    # Nor does a file that holds no tensors come through as weights.
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        convert(hf, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_existing_output_is_kept(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        convert(hf, tmp_path / "out")
    assert (tmp_path / "out" / "notes").read_text() == "mine"


def test_full_disk_is_reported_before_the_work(hf: Path, tmp_path: Path) -> None:
    with (
        mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1000)),
        pytest.raises(UserError, match=r"out: saving failed, .* it needs [\d,]+ bytes, 1,000 are free"),
    ):
        convert(hf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_killed_in_the_middle(hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import os, sys\nfrom checkpoints_convert import hf_to_megatron, import_hf\n"
        "import_hf.start_writeback = lambda *_: os.kill(os.getpid(), 9)\nhf_to_megatron.main()"
    )
    command = [sys.executable, "-c", code, "--hf", str(hf), "--out", str(out)]
    assert subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True).returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("out.*.tmp")
    assert left.is_dir()
    assert not out.exists()
    assert not is_complete(left)
    with pytest.raises(UserError, match="not a complete Megatron checkpoint"):
        CheckpointReader(left)
    convert(hf, out)
    assert not left.exists()
    assert_same(hf, out, torch.float32)
