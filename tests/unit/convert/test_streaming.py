"""The parts of a streaming conversion."""

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from checkpoints_convert.pieces import FiniteCheck, share
from checkpoints_convert.safetensors_file import SafetensorsFile
from checkpoints_convert.streaming import read_ahead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_file_is_as_the_library_would_write_it(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(5, 3).to(dtype), "b": torch.randn(7).to(dtype)}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with SafetensorsFile(tmp_path / "f", shapes, dtype) as file:
        file.write_rows("a", 0, tensors["a"][:2])
        file.write_rows("a", 2, tensors["a"][2:])
        file.write_rows("b", 0, tensors["b"])
    assert (tmp_path / "f").stat().st_size == file.size
    for name, tensor in load_file(tmp_path / "f").items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, tensors[name])
    with safe_open(tmp_path / "f", framework="pt") as stream:
        assert stream.metadata() == {"format": "pt"}
    with pytest.raises(FileExistsError):
        SafetensorsFile(tmp_path / "f", shapes, dtype)
    content = (tmp_path / "f").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    assert json.loads(content[8 : 8 + length])["b"]["shape"] == [7]


@pytest.mark.parametrize(
    ("first", "rows", "message"),
    [
        (4, torch.ones(2, 3), "do not fit"),
        (0, torch.ones(1, 4), "do not fit"),
        (0, torch.ones(1, 3).half(), "do not fit"),
        (1, torch.ones(1, 3), "not what comes next"),
    ],
)
def test_rows_that_do_not_fit(tmp_path: Path, first: int, rows: torch.Tensor, message: str) -> None:
    file = SafetensorsFile(tmp_path / "f", {"a": (5, 3)}, torch.float32)
    with pytest.raises(ValueError, match=message), file:
        file.write_rows("a", first, rows)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_are_a_partition_in_order(ranks: int) -> None:
    sizes = [5, 1, 1, 40, 3, 3, 3, 3, 20, 1]
    shares = [share(range(len(sizes)), sizes, rank, ranks) for rank in range(ranks)]
    assert [item for part in shares for item in part] == list(range(len(sizes)))
    if ranks == 2:
        assert max(sum(sizes[i] for i in part) for part in shares) <= 50


def test_nothing_to_share() -> None:
    assert share([], [], 0, 2) == []
    assert share(["empty"], [0], 0, 1) == ["empty"]


def test_reads_one_ahead() -> None:
    reading, may_go_on = threading.Event(), threading.Event()

    def read(item: int) -> int:
        if item == 1:
            reading.set()
            assert may_go_on.wait(10)
        return item * item

    results = read_ahead(read, [0, 1, 2])
    assert next(results) == (0, 0)
    assert reading.wait(10)  # the second is being read while we have the first
    may_go_on.set()
    assert list(results) == [(1, 1), (2, 4)]
    assert list(read_ahead(read, [])) == []


def test_read_errors_come_through() -> None:
    def read(item: int) -> int:
        raise OSError(f"item {item}")

    with pytest.raises(OSError, match="item 5"):
        list(read_ahead(read, [5, 6]))


def test_what_other_ranks_have_seen_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second rank has found two tensors, and its log goes nowhere."""

    def gathered(seen: list[list[str]], own: list[str], group: object) -> None:
        seen[:] = [own, ["b", "c"]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        FiniteCheck().warn(Path("checkpoint"))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["checkpoint: NaN or infinite values in b and 1 other tensors: no training starts with them"]
