"""The sending of hidden states between pipeline stages: the policy's, and with them the frozen models', forwards only.

The frozen models' states are one tensor that no autograd graph knows, handed over in a :class:`P2PBuffer`. So backward
traffic is that of policy-only training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor


@dataclass
class P2PBuffer:
    """Hands the frozen hidden states of micro batches between the models of a stage and the communicator.

    There is one tensor each way at most: what a stage receives, its very next forward takes. So it is in the
    interleaved schedule, too: with micro batches in groups as large as there are stages, the last stage ends a chunk of
    a micro batch when the first is about to begin the next chunk of it (megatron-core 0.16.1 and 0.19.2 ``schedules.py:
    recv_tensor_from_previous_stage``, whose buffer for the first stage has one place then).

    Attributes:
        width: Sum of the frozen models' hidden sizes.
        dtype: Of their hidden states.
        incoming: [S_local, 1, width] received from the previous stage for the next forward.
        outgoing: [S_local, 1, width] computed by the last forward, to be sent to the next stage.
    """

    width: int
    dtype: torch.dtype
    incoming: Tensor | None = None
    outgoing: Tensor | None = None

    def expect(self, tensor: Tensor) -> None:
        """Keeps what is being received."""
        assert self.incoming is None, "frozen hidden states were received, and no forward took those before"
        self.incoming = tensor

    def take_incoming(self) -> Tensor:
        tensor, self.incoming = self.incoming, None
        assert tensor is not None, "forward before the frozen hidden states were received"
        return tensor

    def take_outgoing(self) -> Tensor:
        tensor, self.outgoing = self.outgoing, None
        assert tensor is not None, "send before the frozen models ran"
        return tensor


class ColocatedCommunicator(P2PCommunicator):
    """Moves the frozen hidden states along with the policy's, forwards only, in the same batch of transfers.

    The interleaved schedule sends in a ring. On two stages both directions then join the same two ranks, and tensors
    are told apart by nothing but their order; so what goes backwards takes another process group there, as in
    megatron-core's unbatched transfers.

    Args:
        pp_group: The pipeline stages of this rank.
        config: Of the policy.
        p2p_buffer: Where the model leaves and finds the frozen hidden states.
        device: Of the tensors.
        meanwhile: Called in every exchange, while it is on its way.

    Attributes:
        forward_bytes: Bytes this rank has sent to the next stage.
        backward_bytes: Bytes this rank has sent to the previous stage.
    """

    def __init__(
        self,
        pp_group: dist.ProcessGroup,
        config: ModelParallelConfig,
        p2p_buffer: P2PBuffer,
        device: torch.device,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(pp_group, config)
        self.p2p_buffer = p2p_buffer
        self.device = device
        ring_of_two = pp_group.size() == 2 and self.virtual_pipeline_model_parallel_size is not None
        self.backward_group = dist.group.WORLD if ring_of_two else pp_group
        self._meanwhile = meanwhile
        self.forward_bytes = 0
        self.backward_bytes = 0

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
                incoming = self._empty([*tensor_shape[:-1], self.p2p_buffer.width], self.p2p_buffer.dtype)
                self.p2p_buffer.expect(incoming)
                forwards.append(self._forward(dist.irecv, incoming, self.prev_rank))
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
        if self._meanwhile is not None:
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
