"""Ranks from torchrun and srun, layouts, and the refusal to train on the CPU by accident."""

import pytest
import torch

from megatron_tgdpo.distributed import cpu_backend
from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.distributed.ranks import read_rank_environment
from megatron_tgdpo.errors import UserError

SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}


def test_torchrun_environment() -> None:
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "99", **SRUN}
    ranks = read_rank_environment(env)
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (3, 4, 1)
    assert (ranks.master_addr, ranks.master_port) == ("a", 99)


def test_srun_environment() -> None:
    ranks = read_rank_environment({**SRUN, "MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.master_addr) == (5, 8, 1, "node1")
    assert read_rank_environment({**SRUN, "SLURM_NNODES": "1"}).master_addr == "127.0.0.1"
    with pytest.raises(UserError, match="MASTER_ADDR"):
        read_rank_environment({**SRUN, "SLURM_NNODES": "2"})


def test_alone_without_a_launcher() -> None:
    ranks = read_rank_environment({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"})  # inside an allocation, without srun
    assert (ranks.rank, ranks.world_size) == (0, 1)


def test_layouts() -> None:
    layout = make_layout(2, 2, 1, True, 8)
    assert layout.data == 2
    assert layout.world_size == 8
    assert str(layout) == "TP2 x PP2 x DP2 + SP"
    assert not make_layout(1, 2, 1, True, 2).sequence_parallel
    with pytest.raises(UserError, match="world size 6 is not divisible"):
        make_layout(2, 2, 1, False, 6)


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_a_gpu_machine_never_falls_back_to_its_cpu(monkeypatch: pytest.MonkeyPatch, requested: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cpu_backend, "nvidia_hardware_present", lambda: True)
    with pytest.raises(UserError, match="CUDA"):
        cpu_backend.resolve_device(requested)
    assert cpu_backend.resolve_device("cpu").type == "cpu"


def test_the_cpu_backend_is_refused_where_cuda_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu_backend.resolve_device("auto").type == "cuda"
    with pytest.raises(UserError, match="CPU backend is refused"):
        cpu_backend.enable_cpu_backend()
    assert not cpu_backend.cpu_backend_enabled()


def test_a_machine_without_nvidia_hardware_uses_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cpu_backend, "nvidia_hardware_present", lambda: False)
    assert cpu_backend.resolve_device("auto").type == "cpu"
    with pytest.raises(UserError, match="is cuda but torch sees no CUDA device"):
        cpu_backend.resolve_device("cuda")
