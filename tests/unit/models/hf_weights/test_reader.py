"""Broken HF directories, each refused before any weight is read, with what is wrong and where."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights import reader
from megatron_tgdpo.models.hf_weights.mapping import expected_shapes
from megatron_tgdpo.models.hf_weights.reader import HfCheckpoint
from tests.tiny_models import make_llama

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "sharded", max_shard_size="60KB")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "single")


def check(path: Path) -> None:
    HfCheckpoint(path).check(expected_shapes(read_hf_config(path)))


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("model-*.safetensors"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_whole_checkpoints_pass(sharded: Path, single: Path) -> None:
    check(sharded)
    check(single)
    assert HfCheckpoint(sharded).tensors.keys() == HfCheckpoint(single).tensors.keys()


def test_slices(single: Path) -> None:
    checkpoint = HfCheckpoint(single)
    name = "model.embed_tokens.weight"
    whole = load_file(single / "model.safetensors")[name]
    assert torch.equal(checkpoint.whole(name), whole)
    assert torch.equal(checkpoint.rows(name, 3, 9), whole[3:9])
    assert torch.equal(checkpoint.columns(name, 3, 9), whole[:, 3:9])
    assert torch.equal(checkpoint.rows(name, 5, 5), whole[5:5])
    norm = load_file(single / "model.safetensors")["model.norm.weight"]
    assert torch.equal(checkpoint.whole("model.norm.weight"), norm)
    assert torch.equal(checkpoint.rows("model.norm.weight", 3, 9), norm[3:9])


def test_columns_are_read_in_blocks(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_BLOCK_BYTES", 1000)
    name = "model.embed_tokens.weight"
    whole = load_file(single / "model.safetensors")[name]
    assert torch.equal(HfCheckpoint(single).columns(name, 3, 9), whole[:, 3:9])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    path = make_llama(tmp_path, layers=1, dtype=dtype)
    for name, tensor in load_file(path / "model.safetensors").items():
        read = HfCheckpoint(path).whole(name)
        assert read.dtype == dtype
        assert torch.equal(read, tensor)


def test_many_files_need_few_descriptors(sharded: Path) -> None:
    checkpoint = HfCheckpoint(sharded)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in checkpoint.tensors:
        checkpoint.whole(name)
    assert len(shards(sharded)) > 4
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 4


def test_file_truncated_after_it_was_checked(single: Path) -> None:
    checkpoint = HfCheckpoint(single)
    file = single / "model.safetensors"
    size = checkpoint.tensors["lm_head.weight"].offset + 100
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=rf"model.safetensors: ends at byte {size:,}: truncated"):
        checkpoint.whole("lm_head.weight")


def change_header(path: Path, change: Callable[[dict], None]) -> None:
    file = path / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])


def test_header_whose_offsets_lie(single: Path) -> None:
    def shrink(header: dict) -> None:
        header["model.norm.weight"]["data_offsets"][1] -= 4

    change_header(single, shrink)
    refused(single, r"model.norm.weight has 252 bytes, its shape \[64\] and F32 need others")


def test_header_with_negative_numbers(single: Path) -> None:
    def negate(header: dict) -> None:
        header["model.norm.weight"]["data_offsets"] = [-256, 0]

    change_header(single, negate)
    refused(single, "corrupt safetensors header")


def test_missing_file(sharded: Path) -> None:
    shards(sharded)[1].unlink()
    refused(sharded, r"model-00002-of-\d+.safetensors is missing")


def test_truncated_file(sharded: Path) -> None:
    file = shards(sharded)[1]
    file.write_bytes(file.read_bytes()[:-1])
    refused(sharded, "truncated, download it again")


def test_truncated_header(single: Path) -> None:
    file = single / "model.safetensors"
    for length in (0, 5, 8, 50):
        content = file.read_bytes()[:length]
        file.write_bytes(content)
        refused(single, "truncated or not a safetensors file")
        file.write_bytes(content + b"x" * 100)
    file.write_bytes(struct.pack("<Q", 1 << 60) + b"x" * 100)
    refused(single, "truncated or not a safetensors file")


def test_corrupt_header(single: Path) -> None:
    file = single / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:20] = b"\xff" * 12
    file.write_bytes(bytes(content))
    refused(single, "corrupt safetensors header")


def test_unreadable_index(sharded: Path) -> None:
    (sharded / INDEX).write_text("{}")
    refused(sharded, "not a readable index")


def test_index_that_leads_elsewhere(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../other.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "leads out of the directory")


def test_index_that_names_what_is_not_there(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.new.weight"] = shards(sharded)[0].name
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "model.new.weight not found in the files it names")


def test_missing_tensor(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    refused(single, "tensor model.layers.2.mlp.up_proj.weight missing")


def test_extra_tensor(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    refused(single, "tensor model.layers.0.self_attn.q_proj.bias not expected")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("intermediate_size", 128, r"shape \[96, 64\] in model.safetensors, config.json asks for \[128, 64\]"),
        ("vocab_size", 132, r"shape \[131, 64\]"),
        ("num_key_value_heads", 4, r"k_proj.weight has shape \[32, 64\]"),
        ("num_hidden_layers", 3, "not expected"),
        ("num_hidden_layers", 5, "missing"),
        ("tie_word_embeddings", True, "lm_head.weight not expected"),
    ],
)
def test_config_that_lies(single: Path, key: str, value: object, message: str) -> None:
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, key: value}))
    refused(single, message)


def test_only_pickled_weights(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    refused(single, r"only pickled weights .* save_pretrained to another directory")
    (single / "consolidated.00.pth").touch()
    refused(single, r"only consolidated files, .* get the safetensors files")


def test_weights_under_another_name(single: Path) -> None:
    (single / "model.safetensors").rename(single / "model.fp16.safetensors")
    refused(single, r"neither model.safetensors nor .* there, only model.fp16.safetensors: rename it")


def test_adapter_is_refused(single: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (single / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"a LoRA adapter \(adapter_config.json\), .* merge_and_unload"):
        HfCheckpoint(adapter)


def test_adapter_beside_a_config_is_refused(single: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    rewrite(single, lambda tensors: tensors.update({name: torch.zeros(4, 64)}))
    refused(single, r"a LoRA adapter \(base_model.*lora_A.weight\), .* merge_and_unload")


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    refused(single, "neither model.safetensors nor")


def test_unsupported_dtype(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(131, 64, dtype=torch.int8)}))
    refused(single, "lm_head.weight is stored as I8")
