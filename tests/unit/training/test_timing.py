"""Steps that are watched tell what they spend in collectives and in exchanges; the others are not slowed."""

import pytest
import torch
import torch.distributed as dist

from megatron_tgdpo.training.timing import SampledTimes, communication_seconds


def test_kernels_and_operations_by_name() -> None:
    """NCCL's kernels as it names them since 2.19, gloo's operations, and what is neither."""
    events = [
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevComm*, unsigned long, ncclWork*)", 3e6),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 2e6),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 5e6),
        ("gloo:all_gather", 1e6), ("gloo:recv", 7e6), ("gloo:send", 7e6),
        ("c10d::allreduce_", 9e6), ("record_param_comms", 9e6), ("aten::mm", 9e6),
    ]  # fmt: skip
    assert communication_seconds(events) == (6.0, 12.0)


def test_every_so_many_steps(single_rank_group: dist.ProcessGroup) -> None:
    times = SampledTimes(2, torch.device("cpu"))
    for step, watched in ((1, False), (2, True), (3, False), (4, True)):
        with times.around(step):
            dist.all_reduce(torch.ones(3), group=single_rank_group)
        seconds = times.take()
        assert (seconds is not None) == watched
        assert seconds is None or (seconds[0] > 0 and seconds[1] == 0.0)
        assert times.take() is None


def test_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tgdpo.training.timing.profile", pytest.fail)
    times = SampledTimes(None, torch.device("cpu"))
    with times.around(1):
        pass
    assert times.take() is None
