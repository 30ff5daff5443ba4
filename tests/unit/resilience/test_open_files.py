"""The count of files and sockets, the limit that is raised for it, and groups that cost none."""

import resource
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.distributed.ranks import RankEnvironment, init_distributed
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.resilience.open_files import allow_open_files, files_needed, mcore_group_sizes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[0], resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def test_the_soft_limit_is_raised_as_far_as_needed(limits: tuple[int, int]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    assert allow_open_files(200) == 256
    assert allow_open_files(300) == 300
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, limits[1])


def test_a_hard_limit_that_is_too_low_is_named() -> None:
    with (
        mock.patch("resource.getrlimit", return_value=(1024, 4096)),
        mock.patch("resource.setrlimit", side_effect=AssertionError("raised")),
        pytest.raises(UserError, match=r": a rank of this layout opens about 5,000 files .* the limit is 4,096: raise"),
    ):
        allow_open_files(5000)


def test_what_large_layouts_need() -> None:
    data_only, large = make_layout(1, 1, 1, False, 128), make_layout(8, 4, 1, True, 1024)
    assert files_needed(data_only, CPU) > 8 * 127
    assert sum(size - 1 for size in mcore_group_sizes(large)) + 2 * 1023 > 3000
    assert files_needed(large, CPU) > 3766
    # On a GPU two meshes are left, of checkpoints and of preflight, whatever the layout.
    assert files_needed(large, CUDA) < 2 * 1024 + 2 * 1024 + 600


def test_groups_on_a_gpu_are_nccl_alone() -> None:
    with (
        mock.patch.object(dist, "is_initialized", return_value=False),
        mock.patch.object(torch.cuda, "device_count", return_value=1),
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(dist, "init_process_group") as joined,
    ):
        init_distributed(RankEnvironment(0, 1, 0, None, None), CUDA, 1, dist.HashStore())
    assert joined.call_args.args == ("nccl",)
