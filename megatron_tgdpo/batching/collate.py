"""The tensors of one pack, from its pairs.

Legend: P pairs in the pack, B = 2P sequences, R response tokens that are trained on, S tokens of a pack; under context
parallelism R and S are those of this rank's part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_tgdpo.batching.packed_sequence import (
    ContextSplit,
    PackedSequence,
    PackFormat,
    Segment,
    SequenceMembers,
    pack_segments,
)
from megatron_tgdpo.data.dataset import PreferencePair


@dataclass(frozen=True)
class PreferenceBatch:
    """One pack, which is one micro batch: pairs back to back, then padding.

    Attributes:
        tokens: [1, S] int64; zeros where there is padding.
        position_ids: [1, S] int64, from 0 in every sequence; zeros on the tail.
        packing: Which tokens attend to which.
        logit_positions: [R] int64, positions whose hidden state predicts a response token. Where prompts are shared,
            the prompt's last position is there twice.
        targets: [R] int64, those response tokens: chosen_0, rejected_0, chosen_1, ...
        response_lengths: [B] int64, response tokens of each sequence (that are on this rank).
        pair_indices: [P] int64, each pair's index in the dataset.
        reference_logps: [R] float32 from the guidance cache; None where the model runs co-located, or there is none.
        guide_logps: [R] float32 from the guidance cache; None where the model runs co-located, or there is none.
        response_order: [R] int64 on the CPU, place of each target among the response tokens of the whole pack.
    """

    tokens: Tensor
    position_ids: Tensor
    packing: PackedSequence
    logit_positions: Tensor
    targets: Tensor
    response_lengths: Tensor
    pair_indices: Tensor
    reference_logps: Tensor | None
    guide_logps: Tensor | None
    response_order: Tensor

    def to(self, device: torch.device) -> "PreferenceBatch":
        """The same pack on ``device``; the segments' bounds stay on the CPU, where the attention reads them."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "PreferenceBatch":
        """The same pack in page-locked memory, which a GPU copies while the host goes on: :meth:`to` of it does not
        wait. CUDA must be there."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "PreferenceBatch":
        """With what goes to a device changed."""

        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        tensors: dict[str, Any] = {name: changed(getattr(self, name)) for name in _ON_DEVICE}
        sequences = self.packing.sequences
        packing = replace(
            self.packing,
            kv_index=changed(self.packing.kv_index),
            sequences=None if sequences is None else sequences.with_tensors(change),
        )
        return replace(self, packing=packing, **tensors)


_ON_DEVICE = (
    "tokens", "position_ids", "logit_positions", "targets", "response_lengths", "pair_indices", "reference_logps",
    "guide_logps",
)  # fmt: skip


class CachedGuidance(Protocol):
    """Token log-probs of the frozen models, by pair."""

    @property
    def guided(self) -> bool:
        """Whether there is a guide besides the reference."""
        ...

    def logps(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Reference's and guide's of a pair, of the tokens trained on: [chosen + rejected] float32 each; no guide's if
        not ``guided``."""
        ...


def collate(
    pairs: Sequence[PreferencePair], pack_format: PackFormat, guidance: CachedGuidance | None = None
) -> PreferenceBatch:
    """Packs pairs into one pack, or this context-parallel rank's part of it.

    An empty list gives a pack of padding only, which adds nothing to loss or gradients.

    Args:
        pairs: They fit the pack.
        pack_format: Its format.
        guidance: Where the frozen models' log-probs come from, if they do not run co-located.
    """
    filled = _FilledPack(pack_format)
    for pair in pairs:
        if pack_format.chosen_only:
            filled.add_sequence(pair.prompt, pair.chosen, pair.chosen_trained)
            filled.skip_response()
        elif pack_format.shared_prompts:
            filled.add_pair(pair)
        else:
            filled.add_sequence(pair.prompt, pair.chosen, pair.chosen_trained)
            filled.add_sequence(pair.prompt, pair.rejected, pair.rejected_trained)
    seq_length = pack_format.cut(filled.bounds[-1])
    tokens, positions = filled.tokens[:seq_length], filled.positions[:seq_length]
    sequence_of = filled.sequence_of[:seq_length]
    logit_positions, targets = _joined(filled.logit_positions), _joined(filled.targets)
    lengths = np.array([len(part) for part in filled.targets], dtype=np.int64)
    weights = lengths if pack_format.chosen_only else np.full(len(lengths), 0.5)
    order = np.arange(len(targets))
    if pack_format.context == 1:
        packing = pack_segments(filled.segments)
    else:
        split = ContextSplit([*filled.bounds, seq_length], pack_format)
        tokens, positions, packing = tokens[split.mine], positions[split.mine], split.packing(filled.segments)
        sequence_of = sequence_of[split.mine]
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        order, logit_positions = split.local(logit_positions)
        targets, lengths = targets[order], np.bincount(sequence[order], minlength=len(lengths))
    packing.sequences = SequenceMembers(torch.from_numpy(sequence_of), torch.from_numpy(weights.astype(np.float32)))
    reference, guide = _cached_logps(pairs, guidance, order)
    return PreferenceBatch(
        tokens=torch.from_numpy(tokens)[None],
        position_ids=torch.from_numpy(positions)[None],
        packing=packing,
        logit_positions=torch.from_numpy(logit_positions),
        targets=torch.from_numpy(targets),
        response_lengths=torch.from_numpy(lengths),
        pair_indices=torch.tensor([pair.index for pair in pairs], dtype=torch.int64),
        reference_logps=reference,
        guide_logps=guide,
        response_order=torch.from_numpy(order),
    )


class _FilledPack:
    """A whole pack while it is being filled; positions are those of the pack."""

    def __init__(self, pack_format: PackFormat) -> None:
        self.pack_format = pack_format
        self.tokens = np.zeros(pack_format.tokens, dtype=np.int64)
        self.positions = np.zeros(pack_format.tokens, dtype=np.int64)
        self.sequence_of = np.full((pack_format.tokens, 2), -1, dtype=np.int64)
        self.segments: list[Segment] = []
        self.bounds = [0]
        self.logit_positions: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []

    def add_sequence(self, prompt: np.ndarray, response: np.ndarray, trained: np.ndarray | None) -> Segment:
        """A prompt and its response, which attend to nothing else; ``trained`` as in `PreferencePair`."""
        start = self.bounds[-1]
        middle, end = start + len(prompt), start + len(prompt) + len(response)
        self.tokens[start:middle] = prompt
        self.tokens[middle:end] = response
        self.positions[start:end] = np.arange(end - start)
        self.sequence_of[start:end, 0] = len(self.targets)
        # The hidden state at position t predicts token t + 1.
        return self._added(Segment(start, end), np.arange(middle - 1, end - 1), response, trained)

    def add_pair(self, pair: PreferencePair) -> None:
        """Prompt, chosen, rejected: rejected sees the prompt and itself, at the positions after the prompt."""
        prompt = len(pair.prompt)
        whole = self.add_sequence(pair.prompt, pair.chosen, pair.chosen_trained)
        start = self.bounds[-1]
        end = start + len(pair.rejected)
        prompt_end = whole.start + prompt
        self.sequence_of[whole.start : prompt_end, 1] = self.sequence_of[start:end, 0] = len(self.targets)
        self.tokens[start:end] = pair.rejected
        self.positions[start:end] = np.arange(prompt, prompt + end - start)
        # Its first token follows the prompt's last.
        predicting = np.concatenate([[prompt_end - 1], np.arange(start, end - 1)])
        segment = Segment(start, end, whole.start, prompt_end)
        self._added(segment, predicting, pair.rejected, pair.rejected_trained)

    def skip_response(self) -> None:
        """A response without tokens, in the place of one that is left out."""
        self.logit_positions.append(np.zeros(0, dtype=np.int64))
        self.targets.append(np.zeros(0, dtype=np.int64))

    def _added(
        self, segment: Segment, predicting: np.ndarray, response: np.ndarray, trained: np.ndarray | None
    ) -> Segment:
        self.segments.append(segment)
        self.bounds.append(segment.start + self.pack_format.padded(segment.end - segment.start))
        self.logit_positions.append(predicting if trained is None else predicting[trained])
        self.targets.append(response if trained is None else response[trained])
        return segment


def _cached_logps(
    pairs: Sequence[PreferencePair], guidance: CachedGuidance | None, order: np.ndarray
) -> tuple[Tensor | None, Tensor | None]:
    """The frozen models' log-probs of the response tokens ``order`` of the whole pack."""
    if guidance is None:
        return None, None
    found = [guidance.logps(pair.index) for pair in pairs]
    reference = torch.from_numpy(_joined([logps for logps, _ in found], np.float32)[order])
    if not guidance.guided:
        return reference, None
    return reference, torch.from_numpy(_joined([logps for _, logps in found if logps is not None], np.float32)[order])


def _joined(arrays: list[np.ndarray], dtype: type = np.int64) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype=dtype)
