"""Policy, reference and guide in one pipeline module: every rank holds its slice of each, only the policy trains.

megatron-core's schedule sees the policy alone: its hidden states go forwards, their gradient comes back. The frozen
models' hidden states go with them in a :class:`~megatron_tgdpo.frozen.communicator.P2PBuffer`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_tgdpo.batching.collate import PreferenceBatch
from megatron_tgdpo.frozen.communicator import P2PBuffer
from megatron_tgdpo.frozen.models import FrozenModel, FrozenModels, model_logps
from megatron_tgdpo.models.language_model import LanguageModel


@dataclass(frozen=True)
class TokenLogps:
    """Token log-probs of one pack on the last stage: [R] float32 each; only the policy's carry a gradient.

    Attributes:
        policy: Of the model that trains.
        frozen: Of the frozen models, in their order.
    """

    policy: Tensor
    frozen: tuple[Tensor, ...]

    @property
    def device(self) -> torch.device:
        """What megatron-core's schedule asks of the last stage's output where the model has experts."""
        return self.policy.device


class ColocatedModel(MegatronModule):
    """The policy with its frozen companions, on one pipeline stage, or in one chunk of it.

    Args:
        policy: The model that trains.
        frozen: The reference and, for TGDPO, the guide; none where their log-probs come from a cache or are
            prefetched. Width and depth may differ from the policy's, the vocabulary may not. Their weights may be the
            policy's, where that trains an adapter only.
        keep_bytes: Memory for the policy's logits that are kept for backward instead of being computed again.
        p2p_buffer: Of the stage's other chunks; None makes one.
    """

    def __init__(
        self,
        policy: LanguageModel,
        frozen: Sequence[FrozenModel] = (),
        *,
        keep_bytes: int = 0,
        p2p_buffer: P2PBuffer | None = None,
    ) -> None:
        super().__init__(policy.config)
        self.keep_bytes = keep_bytes
        self.policy = policy
        self.frozen = FrozenModels(frozen)
        self.p2p_buffer = p2p_buffer or P2PBuffer(sum(self.frozen.widths), dtype=policy.config.params_dtype)
        self._incoming: Tensor | Sequence[Tensor | None] | None = None
        # What megatron-core's schedule and gradient finalisation read from a pipeline module.
        self.model_type = policy.model_type
        self.pre_process = policy.pre_process
        self.post_process = policy.post_process
        # Beside adapters that train, a weight that two stages share is frozen, and has no gradient to be summed.
        self.share_embeddings_and_output_weights = (
            policy.share_embeddings_and_output_weights and not policy.config.adapters
        )

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The policy's shared weight on the stages that hold it; megatron-core sums its gradient over both."""
        result: Tensor | None = self.policy.shared_embedding_or_output_weight()
        return result if self.share_embeddings_and_output_weights else None

    def set_input_tensor(self, input_tensor: Tensor | Sequence[Tensor | None] | None) -> None:
        """Takes the policy's hidden states [S_local, 1, H] from the previous stage (None on the first)."""
        self._incoming = input_tensor

    def forward(self, batch: PreferenceBatch) -> Tensor | TokenLogps:
        """Runs the layers here of all models on one pack.

        Returns:
            The policy's hidden states [S_local, 1, H], or of the last layers the token log-probs of all models.
        """
        frozen: tuple[Tensor, ...] = ()
        if self.p2p_buffer.width:
            frozen = self.frozen(batch, None if self.pre_process else self.p2p_buffer.take_incoming())
        hidden = self.run_policy(batch)
        if self.post_process:
            return TokenLogps(model_logps(self.policy, hidden, batch, self.keep_bytes), frozen)
        if frozen:
            (self.p2p_buffer.outgoing,) = frozen
        result: Tensor | TokenLogps = hidden
        return result

    def run_policy(self, batch: PreferenceBatch) -> Tensor:
        """The layers here of the policy alone, on a pack and what :meth:`set_input_tensor` was given.

        Returns:
            [S_local, 1, H] hidden states.
        """
        # Not before: a frozen model of the same weights has its own.
        self.policy.set_input_tensor(self._incoming)
        result: Tensor = self.policy(batch.tokens, batch.position_ids, batch.packing)
        return result


def colocated_chunks(
    policy: Sequence[LanguageModel], frozen: Sequence[Sequence[FrozenModel]] = (), *, keep_bytes: int = 0
) -> list[ColocatedModel]:
    """The chunks of one stage, a single one without the interleaved schedule; they share the :class:`P2PBuffer`.

    Args:
        policy: Its chunks.
        frozen: The frozen models of each chunk; none where they do not run in the policy's forward.
        keep_bytes: As for :class:`ColocatedModel`.
    """
    chunks: list[ColocatedModel] = []
    for number, part in enumerate(policy):
        companions = frozen[number] if frozen else ()
        buffer = chunks[0].p2p_buffer if chunks else None
        chunks.append(ColocatedModel(part, companions, keep_bytes=keep_bytes, p2p_buffer=buffer))
    return chunks
