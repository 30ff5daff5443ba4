"""Damage is found wherever it is, and named."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_tgdpo import checkpoint_format
from megatron_tgdpo.checkpoint_check import find_damage
from tests.tiny_models import make_llama


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, single_rank_group: dist.ProcessGroup) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    data = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    state = {name: ShardedTensor.from_rank_offsets(name, data + i) for i, name in enumerate(("one", "two"))}
    checkpoint_format.save(root / "saved", {**state, "step": 5}, make_llama(root / "hf", layers=1), {"dtype": "fp32"})
    return root / "saved"


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_nothing_is_found_where_nothing_is_wrong(saved: Path, one_rank: None) -> None:
    assert find_damage(saved) is None


@pytest.mark.parametrize("part", [0.3, 0.7])
def test_one_flipped_bit_of_a_tensor(copy: Path, one_rank: None, part: float) -> None:
    file = copy / "__0_0.distcp"
    flip(file, int(file.stat().st_size * part))
    damage = find_damage(copy)
    assert damage == f"{file}: the bytes of {'one' if part < 0.5 else 'two'} are not those that were written"


def test_every_flipped_bit_of_the_plain_values_is_found_or_harmless(copy: Path, one_rank: None) -> None:
    file = copy / "common.pt"
    whole = file.read_bytes()
    for position in range(0, len(whole), 7):
        flip(file, position)
        if find_damage(copy) is None:
            # In padding, or in a field of the archive that no reader uses.
            assert torch.load(file, weights_only=True) == {"step": 5}
        file.write_bytes(whole)


def test_a_truncated_file(copy: Path, one_rank: None) -> None:
    file = copy / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-10])
    damage = find_damage(copy)
    assert damage is not None
    assert damage.startswith(f"{file}: ends before byte")


@pytest.mark.parametrize("name", ["__0_0.distcp", "common.pt", ".metadata"])
def test_a_missing_file(copy: Path, one_rank: None, name: str) -> None:
    (copy / name).unlink()
    assert find_damage(copy) == f"{copy / name}: No such file or directory"


def test_unreadable_metadata(copy: Path, one_rank: None) -> None:
    flip(copy / ".metadata", 0)
    damage = find_damage(copy)
    assert damage is not None
    assert damage.startswith(f"{copy}/.metadata: ")
