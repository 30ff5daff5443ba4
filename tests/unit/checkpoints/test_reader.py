"""Rows of a checkpoint's tensors, however it was divided when it was saved."""

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from megatron_tgdpo.checkpoints import reader as checkpoint_reader
from megatron_tgdpo.checkpoints.reader import CheckpointReader
from megatron_tgdpo.errors import DamageError, StorageError, UserError
from megatron_tgdpo.storage.files import FilePart
from tests.checkpoints import save
from tests.tiny_models import make_llama

LAYERS, ROWS, COLUMNS = 3, 6, 8
STACK = torch.arange(LAYERS * ROWS * COLUMNS, dtype=torch.float32).view(LAYERS, ROWS, COLUMNS)
VECTOR = torch.arange(7.0)


@pytest.fixture
def checkpoint(tmp_path: Path, one_rank: None) -> Path:
    """Layers apart, each split by rows and by columns, as tensor parallelism and gated MLPs do."""
    whole = {"vector": VECTOR, "layers together": STACK}
    state = {name: ShardedTensor.from_rank_offsets(name, tensor.clone()) for name, tensor in whole.items()}
    for layer, row, column in itertools.product(range(LAYERS), range(2), range(2)):
        part = STACK[layer, 3 * row : 3 * row + 3, 4 * column : 4 * column + 4].clone()
        offsets = (0, layer, LAYERS), (1, row, 2), (2, column, 2)
        state[f"{layer}{row}{column}"] = ShardedTensor.from_rank_offsets("stack", part, *offsets, prepend_axis_num=1)
    save(tmp_path / "saved", state, make_llama(tmp_path / "hf", layers=1), {"dtype": "fp32"})
    return tmp_path / "saved"


@pytest.mark.parametrize("block", [1, 40, 1 << 20])
@pytest.mark.parametrize(("start", "end"), [(0, 6), (2, 5), (1, 2), (3, 3)])
def test_rows(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, block: int, start: int, end: int) -> None:
    monkeypatch.setattr(checkpoint_reader, "_BLOCK_BYTES", block)
    reader = CheckpointReader(checkpoint)
    assert len(reader.tensors["stack"].chunks) == 4 * LAYERS
    for layer in range(LAYERS):
        assert torch.equal(reader.rows("stack", layer, start, end), STACK[layer, start:end])
    assert torch.equal(reader.rows("vector", None, start, end), VECTOR[start:end])


def test_only_the_parts_of_a_layer_are_looked_at(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of experts has many parts and is read as often: all of them each time is quadratic."""
    looked_at = []
    find = checkpoint_reader.create_read_items_for_chunk_list

    def counted(key: str, info: TensorStorageMetadata, wanted: list[ChunkStorageMetadata]) -> list[ReadItem]:
        looked_at.append(len(info.chunks))
        return find(key, info, wanted)

    monkeypatch.setattr(checkpoint_reader, "create_read_items_for_chunk_list", counted)
    reader = CheckpointReader(checkpoint)
    for layer in range(LAYERS):
        assert torch.equal(reader.rows("stack", layer, 1, 5), STACK[layer, 1:5])
        assert torch.equal(reader.rows("layers together", layer, 1, 5), STACK[layer, 1:5])
    assert looked_at == [4, 1] * LAYERS


def test_rows_that_are_not_there(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="parts of vector are missing"):
        CheckpointReader(checkpoint).rows("vector", None, 5, 9)


def test_damaged_file(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(b"x" * len(content))
    with pytest.raises(UserError, match=r"saved: cannot load: "):
        CheckpointReader(checkpoint).rows("vector", None, 0, 7)
    reader = CheckpointReader(checkpoint)
    file.unlink()
    with pytest.raises(UserError, match=r"saved: cannot load: FileNotFoundError"):
        reader.rows("vector", None, 0, 7)
    with pytest.raises(DamageError, match=r"__0_0\.distcp: missing"):
        CheckpointReader(checkpoint)


@pytest.mark.parametrize("call", [0, 1, 2, 5])
def test_a_read_error_is_not_taken_for_damage(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Whichever read fails: torch's reader, zip's or ours."""
    preadv, calls = os.preadv, itertools.count()

    def failing(*arguments: Any) -> int:
        if next(calls) == call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        CheckpointReader(checkpoint).rows("vector", None, 0, 7)


def test_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    part = FilePart(descriptor, 2, 5)
    assert part.read() == b"23456"
    assert part.read() == b""
    assert part.seek(-2, os.SEEK_END) == 3
    assert part.read(1) == b"5"
    assert part.seek(1, os.SEEK_CUR) == 5
    with pytest.raises(OSError, match="Invalid argument"):
        part.seek(-1)
    assert FilePart(descriptor, 8, 5).read() == b"89"
    os.close(descriptor)
