"""Runs of a tensor's elements as rectangles."""

import math

import pytest
import torch

from megatron_tgdpo.training.sharded_optimizer_state import boxes


@pytest.mark.parametrize("shape", [(7,), (4, 5), (1, 6), (6, 1), (3, 2, 4)])
def test_boxes_hold_a_run_of_elements_in_order(shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    tensor = torch.arange(count).view(shape)
    for start in range(count + 1):
        for end in range(start, count + 1):
            parts = []
            for offset, size in boxes(shape, start, end):
                part = tensor
                for axis, (begin, length) in enumerate(zip(offset, size, strict=True)):
                    part = part.narrow(axis, begin, length)
                assert part.shape == size
                parts.append(part.flatten())
            assert len(parts) <= 2 * len(shape) - 1
            got = torch.cat(parts).tolist() if parts else []
            assert got == list(range(start, end))
