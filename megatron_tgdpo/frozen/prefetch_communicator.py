"""The channel of hidden states of frozen models that run apart from the policy: sending never waits."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class FrozenChannel:
    """Sends hidden states to the next stage and receives those of the stage before, in order. Sending does not wait.

    Neighbouring links use different process groups: operations of one NCCL group wait for each other on a rank, and
    receiving must not wait for what was sent.

    Args:
        group: The pipeline stages of this rank. The constructor is collective over all ranks.
        shape: Of the tensors.
        dtype: Of the tensors.
        device: Of the tensors.
        timeout_minutes: Of the new process groups.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        timeout_minutes: float,
    ) -> None:
        self._shape, self._dtype, self._device = tuple(shape), dtype, device
        self._ranks = dist.get_process_group_ranks(group)
        self.stage, self.stages = group.rank(), group.size()
        self._links = [_twin(self._ranks, device, timeout_minutes) for _ in range(2)]
        self._sending: list[tuple[dist.Work, Tensor]] = []

    def receive(self) -> Tensor | None:
        """What the stage before sent next; None on the first stage."""
        if self.stage == 0:
            return None
        tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        self._start(dist.irecv, tensor, self.stage - 1).wait()
        return tensor

    def send(self, tensor: Tensor) -> None:
        """Starts sending to the next stage."""
        self._sending = [(work, sent) for work, sent in self._sending if not work.is_completed()]
        self._sending.append((self._start(dist.isend, tensor.contiguous(), self.stage + 1), tensor))

    def flush(self) -> None:
        """Waits until all that was sent has left."""
        for work, _ in self._sending:
            work.wait()
        self._sending = []

    def _start(self, operation: object, tensor: Tensor, peer: int) -> dist.Work:
        # The link is named by its first stage. One operation in a batch: unbatched ones would join pairs of ranks anew.
        link = self._links[min(peer, self.stage) % 2]
        (work,) = dist.batch_isend_irecv([dist.P2POp(operation, tensor, self._ranks[peer], link)])  # type: ignore[arg-type]
        return work


def _twin(ranks: list[int], device: torch.device, timeout_minutes: float) -> dist.ProcessGroup:
    """A new group of the same ranks, connected. Collective over all ranks, which all make their group's."""
    everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, ranks)
    mine = None
    for members in sorted({tuple(group) for group in everyone}):
        group = dist.new_group(list(members), timeout=timedelta(minutes=timeout_minutes))
        if list(members) == ranks:
            mine = group
    assert mine is not None
    # NCCL connects the ranks of a group at its first operation, which all of them must join.
    dist.all_reduce(torch.zeros(1, device=device), group=mine)
    result: dist.ProcessGroup = mine
    return result
