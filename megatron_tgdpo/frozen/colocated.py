"""Policy, reference and guide in one pipeline module: every rank holds its slice of each, only the policy trains.

megatron-core's schedule sees the policy alone: its hidden states go forwards, their gradient comes back. The frozen
models' hidden states travel beside them, in one tensor that no autograd graph knows, put into and taken from a
:class:`FrozenMailbox` by the communicator. So backward traffic is that of policy-only training.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_tgdpo.batching.collate import PreferenceBatch
from megatron_tgdpo.frozen.models import FrozenModels, model_logps
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


@dataclass
class FrozenMailbox:
    """Hands the frozen hidden states of one micro batch between the model and the communicator.

    Attributes:
        width: Sum of the frozen models' hidden sizes.
        dtype: Of their hidden states.
        incoming: [S_local, 1, width] received from the previous stage for the coming forward.
        outgoing: [S_local, 1, width] computed by the last forward, to be sent to the next stage.
    """

    width: int
    dtype: torch.dtype
    incoming: Tensor | None = None
    outgoing: Tensor | None = None

    def take_incoming(self) -> Tensor:
        tensor, self.incoming = self.incoming, None
        assert tensor is not None, "forward before the frozen hidden states were received"
        return tensor

    def take_outgoing(self) -> Tensor:
        tensor, self.outgoing = self.outgoing, None
        assert tensor is not None, "send before the frozen models ran"
        return tensor


class ColocatedModel(MegatronModule):
    """The policy with its frozen companions, on one pipeline stage.

    Args:
        policy: The model that trains.
        frozen: The reference and, for TGDPO, the guide; none where their log-probs come from a cache or are
            prefetched. Width and depth may differ from the policy's, the vocabulary may not.
        keep_bytes: Memory for the policy's logits that are kept for backward instead of being computed again.
    """

    def __init__(self, policy: LanguageModel, frozen: Sequence[LanguageModel] = (), *, keep_bytes: int = 0) -> None:
        super().__init__(policy.config)
        self.keep_bytes = keep_bytes
        self.policy = policy
        self.frozen = FrozenModels(frozen)
        self.p2p_buffer = FrozenMailbox(sum(self.frozen.widths), dtype=policy.config.params_dtype)
        # What megatron-core's schedule and gradient finalisation read from a pipeline module.
        self.model_type = policy.model_type
        self.pre_process = policy.pre_process
        self.post_process = policy.post_process
        self.share_embeddings_and_output_weights = policy.share_embeddings_and_output_weights

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The policy's shared weight on the stages that hold it; megatron-core sums its gradient over both."""
        return self.policy.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor | Sequence[Tensor | None] | None) -> None:
        """Takes the policy's hidden states [S_local, 1, H] from the previous stage (None on the first)."""
        self.policy.set_input_tensor(input_tensor)

    def forward(self, batch: PreferenceBatch) -> Tensor | TokenLogps:
        """Runs this stage's layers of all models on one pack.

        Returns:
            The policy's hidden states [S_local, 1, H], or on the last stage the token log-probs of all models.
        """
        frozen: tuple[Tensor, ...] = ()
        if self.p2p_buffer.width:
            frozen = self.frozen(batch, None if self.pre_process else self.p2p_buffer.take_incoming())
        hidden = self.policy(batch.tokens, batch.position_ids, batch.packing)
        if self.post_process:
            return TokenLogps(model_logps(self.policy, hidden, batch, self.keep_bytes), frozen)
        if frozen:
            (self.p2p_buffer.outgoing,) = frozen
        return hidden


def _nothing() -> None:
    """What a stage does while it waits, if nothing else is asked for."""


class ColocatedCommunicator(P2PCommunicator):
    """Moves the frozen hidden states along with the policy's, forwards only, in the same batch of transfers.

    The interleaved schedule sends in a ring. On two stages both directions then join the same two ranks, and tensors
    are told apart by nothing but their order; so what goes backwards takes another process group there, as in
    megatron-core's unbatched transfers.

    Attributes:
        forward_bytes: Bytes this rank has sent to the next stage.
        backward_bytes: Bytes this rank has sent to the previous stage.
    """

    def __init__(
        self, pp_group: dist.ProcessGroup, config: ModelParallelConfig, p2p_buffer: FrozenMailbox, device: torch.device
    ) -> None:
        super().__init__(pp_group, config)
        self.p2p_buffer = p2p_buffer
        self.device = device
        ring_of_two = pp_group.size() == 2 and self.virtual_pipeline_model_parallel_size is not None
        self.backward_group = dist.group.WORLD if ring_of_two else pp_group
        self._meanwhile: Callable[[], None] = _nothing
        self.forward_bytes = 0
        self.backward_bytes = 0

    @contextmanager
    def busy_with(self, meanwhile: Callable[[], None]) -> Iterator[None]:
        """Calls ``meanwhile`` in every exchange, while it is on its way."""
        self._meanwhile = meanwhile
        try:
            yield
        finally:
            self._meanwhile = _nothing

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Sequence[int] | None,
        wait_on_reqs: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        """One exchange with both neighbours: the policy's tensor first, the frozen one after it, where they travel."""
        del wait_on_reqs  # every schedule that this project runs waits
        forwards: list[dist.P2POp] = []
        backwards = [] if self.backward_group is not self.pp_group else forwards
        received_prev = received_next = None
        if tensor_send_prev is not None:
            self.backward_bytes += tensor_send_prev.nbytes
            backwards.append(self._backward(dist.isend, tensor_send_prev.contiguous(), self.prev_rank))
        if recv_prev:
            assert tensor_shape is not None
            received_prev = self._empty(tensor_shape, self.config.pipeline_dtype).requires_grad_()
            forwards.append(self._forward(dist.irecv, received_prev, self.prev_rank))
            if self.p2p_buffer.width:
                self.p2p_buffer.incoming = self._empty(
                    [*tensor_shape[:-1], self.p2p_buffer.width], self.p2p_buffer.dtype
                )
                forwards.append(self._forward(dist.irecv, self.p2p_buffer.incoming, self.prev_rank))
        if tensor_send_next is not None:
            for tensor in (tensor_send_next, *([self.p2p_buffer.take_outgoing()] if self.p2p_buffer.width else ())):
                self.forward_bytes += tensor.nbytes
                forwards.append(self._forward(dist.isend, tensor.contiguous(), self.next_rank))
        if recv_next:
            assert tensor_shape is not None
            received_next = self._empty(tensor_shape, self.config.pipeline_dtype)
            backwards.append(self._backward(dist.irecv, received_next, self.next_rank))
        batches = [forwards] if backwards is forwards else [forwards, backwards]
        requests = [request for ops in batches if ops for request in dist.batch_isend_irecv(ops)]
        self._meanwhile()
        for request in requests:
            request.wait()
        return received_prev, received_next, None

    def _forward(self, operation: object, tensor: Tensor, peer: int | None) -> dist.P2POp:
        return dist.P2POp(operation, tensor, peer, self.pp_group)  # type: ignore[arg-type]

    def _backward(self, operation: object, tensor: Tensor, peer: int | None) -> dist.P2POp:
        return dist.P2POp(operation, tensor, peer, self.backward_group)  # type: ignore[arg-type]

    def _empty(self, shape: Sequence[int], dtype: torch.dtype | None) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)
