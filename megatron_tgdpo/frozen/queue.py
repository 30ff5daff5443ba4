"""Frozen forward passes apart from the policy's: pack after pack, every stage at its own pace.

Their hidden states have a channel of their own, so that sending them never holds up the policy's exchanges.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_tgdpo.batching.collate import PreferenceBatch
from megatron_tgdpo.frozen.models import FrozenModels
from megatron_tgdpo.frozen.prefetch_communicator import FrozenChannel


class FrozenQueue:
    """The passes of the frozen models over the packs that are added, and their log-probs until the policy runs.

    Every stage adds the same packs in the same order.

    Attributes:
        added: Packs added so far.
        done: Passes that this stage has run.
        served: Packs whose log-probs were asked for.
    """

    def __init__(self, models: FrozenModels, channel: FrozenChannel, device: torch.device) -> None:
        self._models, self._channel, self._device = models, channel, device
        self._packs: deque[PreferenceBatch] = deque()
        self._logps: deque[tuple[Tensor, ...]] = deque()
        self.added = self.done = self.served = 0

    def add(self, packs: Iterable[PreferenceBatch]) -> None:
        """Queues packs for their passes."""
        before = len(self._packs)
        self._packs.extend(packs)
        self.added += len(self._packs) - before

    def run_to(self, number: int) -> None:
        """Runs passes on this stage until ``number`` are done in all; waits for the stage before where it must."""
        while self.done < number:
            output = self._models(self._packs.popleft().to(self._device), self._channel.receive())
            if self._channel.stage < self._channel.stages - 1:
                self._channel.send(output[0])
            else:
                self._logps.append(output)
            self.done += 1

    def with_logps(self, pack: PreferenceBatch) -> PreferenceBatch:
        """The next pack, whose pass is done, with the frozen models' log-probs on the last stage."""
        self.served += 1
        if not self._logps:
            return pack
        reference, *guide = self._logps.popleft()
        return replace(pack, reference_logps=reference, guide_logps=guide[0] if guide else None)

    def flush(self) -> None:
        """Waits until what this stage has sent has left."""
        self._channel.flush()
