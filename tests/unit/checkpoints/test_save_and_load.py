"""A Megatron checkpoint is whole or refused, and no file in it can run code."""

import copyreg
import io
import json
import pickle
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan

from checkpoints_convert.command_line import find_checkpoint
from megatron_tgdpo.checkpoints import listing as checkpoint_directory
from megatron_tgdpo.checkpoints.dcp_io import SafeReader, Writer
from megatron_tgdpo.checkpoints.load import load_sharded
from megatron_tgdpo.checkpoints.manifest import read_metadata
from megatron_tgdpo.checkpoints.model_directory import is_megatron_checkpoint
from megatron_tgdpo.checkpoints.reader import CheckpointReader
from megatron_tgdpo.errors import UserError
from tests.checkpoints import Payload, is_complete, save, without_manifest
from tests.tiny_models import make_llama

WEIGHT = torch.arange(12.0).view(3, 4)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_llama(tmp_path_factory.mktemp("hf"), layers=1)
    (path / "modeling_custom.py").write_text("raise SystemExit")
    (path / "training_args.bin").write_bytes(b"x")
    (path / "tokenizer.model").write_bytes(b"sentencepiece")
    return path


def state(weight: torch.Tensor = WEIGHT, key: str = "w") -> dict[str, Any]:
    return {
        "model": {"w": ShardedTensor.from_rank_offsets(key, weight.clone())},
        "random": ShardedObject("random", {"seed": 5}, (1,), (0,)),
        "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}],
    }


@pytest.fixture
def saved(tmp_path: Path, hf: Path, one_rank: None) -> Path:
    path = tmp_path / "step_00000003"
    save(path, state(), hf, {"step": 3, "dtype": "fp32", "parameters": 12})
    return path


def test_comes_back(saved: Path) -> None:
    wanted = state(torch.zeros(3, 4))
    wanted["random"] = ShardedObject("random", None, (1,), (0,))
    del wanted["groups"]
    loaded = load_sharded(saved, wanted)
    assert torch.equal(loaded["model"]["w"], WEIGHT)
    assert loaded["random"] == {"seed": 5}
    assert loaded["groups"] == [{"lr": 0.1, "betas": (0.9, 0.95)}]
    metadata = {"format_version": 1, "step": 3, "dtype": "fp32", "parameters": 12}
    assert read_metadata(saved) == metadata
    assert is_complete(saved)
    assert is_megatron_checkpoint(saved)


def test_default_loader_of_megatron_core_reads_it(saved: Path) -> None:
    from megatron.core import dist_checkpointing

    wanted = {"model": {"w": ShardedTensor.from_rank_offsets("w", torch.zeros(3, 4))}}
    assert torch.equal(dist_checkpointing.load(wanted, str(saved))["model"]["w"], WEIGHT)


def test_holds_what_an_export_needs_and_no_code(saved: Path, hf: Path) -> None:
    copied = {path.name for path in (saved / "hf").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"} <= copied
    assert not any(name.endswith((".py", ".bin", ".safetensors")) for name in copied)
    assert (saved / "hf" / "config.json").read_bytes() == (hf / "config.json").read_bytes()


def test_saving_over_something_is_refused(saved: Path, hf: Path) -> None:
    before = sorted(path.name for path in saved.iterdir())
    with pytest.raises(UserError, match="exists and is not empty"):
        save(saved, state(), hf, {})
    assert sorted(path.name for path in saved.iterdir()) == before


def test_an_interrupted_save_is_never_taken_for_whole(saved: Path, hf: Path) -> None:
    output_dir = saved.parent / "run"
    checkpoints = output_dir / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copytree(saved, checkpoints / "step_00000003")
    shutil.copytree(saved, checkpoints / "step_00000010.tmp")  # killed before the rename
    shutil.copytree(saved, checkpoints / "step_00000020")
    (checkpoints / "step_00000020" / "tgdpo.json").unlink()
    assert not is_complete(checkpoints / "step_00000010.tmp")
    assert not is_complete(checkpoints / "step_00000020")
    assert find_checkpoint(output_dir) == checkpoints / "step_00000003"
    for path in (checkpoints / "step_00000010.tmp", checkpoints / "step_00000020"):
        with pytest.raises(UserError, match="not a complete Megatron checkpoint"):
            load_sharded(path, state())
    assert checkpoint_directory.remove_incomplete(checkpoints) == [checkpoints / "step_00000010.tmp"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000003", "step_00000020"]
    shutil.rmtree(checkpoints / "step_00000003")
    with pytest.raises(UserError, match=r"--megatron .*step_00000020: not a complete Megatron checkpoint"):
        find_checkpoint(output_dir)


def test_newest_is_by_number(saved: Path) -> None:
    checkpoints = saved.parent / "run" / "checkpoints"
    for step in ("step_00000009", "step_100000000"):
        shutil.copytree(saved, checkpoints / step)
    assert checkpoint_directory.newest_checkpoint(checkpoints.parent) == checkpoints / "step_100000000"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (state(key="other"), "lacks 1 of the tensors asked for, first other"),
        (state(torch.zeros(3, 5)), "Global shape mismatch"),
    ],
)
def test_another_model_is_refused(saved: Path, wanted: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_sharded(saved, wanted)
    assert "\n" not in str(error.value)


def test_truncated_data_is_refused(saved: Path) -> None:
    file = next(saved.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"distcp: 100 bytes, [\d,]+ were written"):
        load_sharded(saved, state())
    with pytest.raises(UserError, match="cannot load"):
        load_sharded(without_manifest(saved), state())


def test_unknown_version_is_refused(saved: Path) -> None:
    (saved / "tgdpo.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(UserError, match="format_version is 99"):
        read_metadata(saved)


def test_metadata_cannot_run_code(saved: Path) -> None:
    (without_manifest(saved) / ".metadata").write_bytes(pickle.dumps(Payload(saved / "executed")))
    with pytest.raises(UserError, match="does not belong into checkpoint metadata"):
        load_sharded(saved, state())
    assert not (saved / "executed").exists()


def metadata_of(saved: Path) -> Metadata:
    reader = SafeReader(saved)
    return reader.read_metadata()


class Newer(pickle.Pickler):
    """Writes metadata as torch 2.15 does: with strides behind the five properties that older versions know."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, TensorProperties):
            return copyreg.__newobj__, (TensorProperties,), (*value.__getstate__()[:5], (4, 1))
        return NotImplemented


def test_metadata_of_newer_torch_and_python_is_read(saved: Path) -> None:
    metadata = metadata_of(saved)
    metadata.storage_meta = StorageMeta(checkpoint_id=saved)
    content = io.BytesIO()
    Newer(content, protocol=2).dump(metadata)
    # The module of Python 3.13's paths.
    newer = re.sub(rb"cpathlib(\._local)?\n", b"cpathlib._local\n", content.getvalue())
    assert newer.count(b"pathlib._local") == 1
    (without_manifest(saved) / ".metadata").write_bytes(newer)
    wanted = state(torch.zeros(3, 4))
    wanted["random"] = ShardedObject("random", None, (1,), (0,))
    assert torch.equal(load_sharded(saved, wanted)["model"]["w"], WEIGHT)
    assert type(metadata_of(saved).state_dict_metadata["w"].properties) is TensorProperties


def test_metadata_is_written_as_older_torch_and_python_read_it(saved: Path) -> None:
    states = []

    class Older(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            assert not module.startswith("pathlib")
            if name == "TensorProperties":
                return type(name, (), {"__setstate__": lambda self, state: states.append(state)})
            return super().find_class(module, name)

    Older(io.BytesIO((saved / ".metadata").read_bytes())).load()
    assert [len(one) for one in states] == [5]


def test_metadata_cannot_change_classes_of_this_process(saved: Path) -> None:
    # BUILD with the class of paths, and a state that replaces one of its methods.
    prepared = b"cpathlib\nPosixPath\n(N}Vis_file\nccollections\nOrderedDict\nstb."
    before = Path.is_file
    (without_manifest(saved) / ".metadata").write_bytes(prepared)
    with pytest.raises(UserError, match="cannot load"):
        load_sharded(saved, state())
    assert Path.is_file is before
    assert "is_file" not in vars(PosixPath)
    was = dict(vars(Metadata))
    for name in (b"__init__", b"storage_meta", b"added"):
        prepared = (
            b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}V" + name + b"\nccollections\nOrderedDict\nstb."
        )
        (saved / ".metadata").write_bytes(prepared)
        with pytest.raises(UserError, match=r"it sets Metadata\.\w+, which is no metadata"):
            load_sharded(saved, state())
        assert dict(vars(Metadata)) == was


@pytest.mark.parametrize("name", ["..", ".", "", "../elsewhere"])
def test_metadata_names_files_of_the_checkpoint_alone(saved: Path, name: str) -> None:
    metadata = metadata_of(saved)
    index = next(iter(metadata.storage_data))
    metadata.storage_data[index] = replace(metadata.storage_data[index], relative_path=name)
    (without_manifest(saved) / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="leads out of the checkpoint"):
        load_sharded(saved, state())


def memo(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


BOMBS = {
    # C's unpickler allocates as many pointers, twice.
    "memo": (b"\x80\x02N" + memo(1 << 26) + b".", "it is no checkpoint metadata"),
    # A tuple that holds another twice, and so on: its hash takes 2^60 steps.
    "tuples": (b"\x80\x02})" + memo(0) + b"".join(2 * (b"h" + bytes([n])) + b"\x86" + memo(n + 1) for n in range(60))
               + b"Ns.", "a key of type tuple"),
    "bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.", "cannot be read"),
    "buffer": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 30) + b"x.", "cannot be read: KeyError"),
    # A path of twice the last one, and so on.
    "paths": (b"\x80\x02" + b"X\x01\0\0\0x" + memo(0) + b"".join(
              b"cpathlib\nPosixPath\nj" + struct.pack("<I", n) + b"j" + struct.pack("<I", n) + b"\x86R" + memo(n + 1)
              for n in range(40)) + b".", "a path longer than"),
    # One large dict, which each of many objects copies.
    "fields": (b"\x80\x02}(" + b"".join(b"X\x03\0\0\0%03dN" % n for n in range(100)) + b"u" + memo(0)
               + b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81j\0\0\0\0b.", "more fields than any"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_metadata_takes_no_more_memory_and_time_than_its_size_says(saved: Path, bomb: str) -> None:
    content, message = BOMBS[bomb]
    (without_manifest(saved) / ".metadata").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            CheckpointReader(saved)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def of_tensor(**values: Any) -> Callable[[Metadata], object]:
    return lambda metadata: vars(metadata.state_dict_metadata["w"]).update(values)


def of_place(**values: Any) -> Callable[[Metadata], object]:
    def change(metadata: Metadata) -> None:
        metadata.storage_data = {index: replace(info, **values) for index, info in metadata.storage_data.items()}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_tensor(size=torch.Size([1 << 40, 4])), "parts of w are missing"),
        (of_tensor(size=torch.Size([1 << 47] * 6), chunks=[]), "parts of w are missing"),
        (of_tensor(size=[3, 4]), "w is described by no tensor's metadata"),
        (of_tensor(chunks=None), "w is described by no tensor's metadata"),
        (of_tensor(chunks=[ChunkStorageMetadata(torch.Size([0]), torch.Size([12]))]), "w is described by no tensor"),
        (of_tensor(properties="float32"), "w is described by no tensor's metadata"),
        (of_tensor(size=torch.Size([1 << 40]), chunks=[ChunkStorageMetadata(torch.Size([0]), torch.Size([1 << 40]))]),
         "w is larger than what is stored of it"),
        (of_place(offset=-1), "is not stored as"),
        (of_place(length="12"), "is not stored as"),
        (of_place(length=1 << 60), "is not stored as"),
        (of_place(relative_path=3), "a place in it is a _StorageInfo"),
        (lambda metadata: vars(metadata).update(state_dict_metadata=[]), "no checkpoint metadata"),
        (lambda metadata: metadata.storage_data.update({MetadataIndex("w", index=2**61 - 1): None}), "a key of type"),
        (lambda metadata: metadata.storage_data.update({MetadataIndex("w", index=1): "x"}), "a place in it is a str"),
    ],
)  # fmt: skip
def test_metadata_of_other_types_and_sizes_is_one_line(
    saved: Path, change: Callable[[Metadata], object], message: str
) -> None:
    metadata = metadata_of(saved)
    change(metadata)
    (without_manifest(saved) / ".metadata").write_bytes(pickle.dumps(metadata))
    for read in (CheckpointReader, lambda path: load_sharded(path, state())):
        with pytest.raises(UserError, match=message) as raised:
            read(saved)
        assert len(str(raised.value).splitlines()) == 1


def test_what_only_looks_like_a_checkpoint_is_none(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step_\N{SUPERSCRIPT TWO}").mkdir(parents=True)
    assert checkpoint_directory.newest_checkpoint(tmp_path / "run") is None


def test_plain_values_cannot_run_code(saved: Path) -> None:
    torch.save({"x": Payload(saved / "executed")}, without_manifest(saved) / "common.pt")
    with pytest.raises(UserError, match="cannot load"):
        load_sharded(saved, state())
    assert not (saved / "executed").exists()


def test_objects_cannot_run_code(saved: Path, hf: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    hostile = {"random": ShardedObject("random", Payload(mark), (1,), (0,))}
    save(tmp_path / "hostile", hostile, hf, {})
    with pytest.raises(UserError, match="cannot load"):
        load_sharded(tmp_path / "hostile", {"random": ShardedObject("random", None, (1,), (0,))})
    assert not mark.exists()


def test_values_that_could_not_be_read_back_are_not_saved(hf: Path, tmp_path: Path, one_rank: None) -> None:
    with pytest.raises(UserError, match="a plain value of the checkpoint cannot be saved"):
        save(tmp_path / "new", {**state(), "plain": Payload(tmp_path / "executed")}, hf, {})
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("new")] == []


def test_an_interrupted_removal_leaves_nothing_that_looks_complete(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / "checkpoints" / "step_00000001"
    shutil.copytree(saved, path)
    assert checkpoint_directory.complete_checkpoints(tmp_path / "run") == [path]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint_directory.remove_checkpoint(path)
    assert any(path.parent.iterdir())
    assert checkpoint_directory.complete_checkpoints(tmp_path / "run") == []
    checkpoint_directory.remove_incomplete(path.parent)
    assert not any(path.parent.iterdir())


def _interrupted(path: Path) -> None:
    raise KeyboardInterrupt


def test_a_rank_without_tensors_writes_no_file(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.set_up_storage_writer(True)
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan([]))])
    assert writer.write_data(plan, DefaultSavePlanner()).wait() == []
    assert not list(tmp_path.iterdir())
    assert writer.digests == {}
