"""Experts in the MLP's place: megatron-core's layer, made exact, and usable without a GPU.

Every token goes to all experts that its router chooses; none is dropped, whatever their load. Source: megatron-core
0.16.1 ``transformer/moe``.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.models.router_losses import RouterLosses, follow_packs


class Router(TopKRouter):
    """megatron-core's router with logits in fp32, from products of any PyTorch.

    Its own function for them asks for Transformer Engine's, by a name that is not bound without it.

    Attributes:
        losses: Of a model that trains with them; else None.
    """

    losses: RouterLosses | None = None

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[S_local, 1, experts] logits -> [S_local, experts]: weights in float32, and whether a token goes there."""
        weights, routed = super().routing(logits, *args, **kwargs)
        if self.losses is not None and torch.is_grad_enabled():
            logits = logits.view(-1, logits.shape[-1])
            weights = self.losses.attach(weights, logits, routed, logits.softmax(dim=-1))
        return weights, routed

    def gating(self, input: Tensor) -> Tensor:
        """[S_local, 1, H] -> [S_local, 1, experts] float32 logits; what backward needs is kept in the input's dtype."""
        if input.dtype == torch.float32:
            return F.linear(input, self.weight, self.bias)
        arguments = (input, self.weight, self.bias)
        logits: Tensor = checkpoint(_fp32_logits, *arguments, use_reentrant=False, preserve_rng_state=False)
        return logits

    def _apply_expert_bias(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: there is none here, and megatron-core compiles the function that looks for it."""


def _fp32_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


class CpuTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """megatron-core's token dispatcher with gloo, which gathers only equal parts, and without streams to wait for."""

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        if point == self.cuda_dtoh_point:
            for name in ("input_splits", "output_splits", "output_splits_tp"):
                sizes = getattr(self, name)
                # As on a GPU: gloo takes no tensor.
                setattr(self, name, sizes.numpy() if isinstance(sizes, Tensor) else sizes)
        return tokens_per_expert

    def dispatch_postprocess(self, tokens: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of all ranks that share these experts, expert by expert; their counts; their weights."""
        tokens, probs = self._gathered(tokens), self._gathered(probs)
        if self.num_local_experts > 1:
            counts, order = self.num_global_tokens_per_local_expert.ravel(), self.sort_input_by_local_experts
            tokens, probs = sort_chunks_by_idxs(tokens, counts, order, probs=probs)
        return tokens, self.tokens_per_expert, probs

    def combine_preprocess(self, outputs: Tensor) -> Tensor:
        """Back from :meth:`dispatch_postprocess`, the outputs of the ranks that share an expert summed."""
        if self.num_local_experts > 1:
            counts, order = self.num_global_tokens_per_local_expert.T.ravel(), self.restore_output_by_local_experts
            outputs, _ = sort_chunks_by_idxs(outputs, counts, order)
        if self.tp_size == 1:
            return outputs
        own = int(self.output_splits_tp[self.tp_rank])
        parts: Tensor = all_to_all(self.tp_group, outputs, [own] * self.tp_size, self.output_splits_tp)
        return parts.view(self.tp_size, own, outputs.shape[-1]).sum(0)

    def _gathered(self, tensor: Tensor) -> Tensor:
        if self.tp_size == 1:
            return tensor
        copies = tensor.repeat(self.tp_size, *(1 for _ in tensor.shape[1:]))
        result: Tensor = all_to_all(self.tp_group, copies, self.output_splits_tp, [len(tensor)] * self.tp_size)
        return result


def prepare_experts(model: GPTModel, layout: ParallelLayout, device: torch.device) -> None:
    """Finishes the layers with experts of a model that was just built.

    Args:
        model: This rank's slice.
        layout: The parallel layout.
        device: Of the model.
    """
    for outer in model.decoder.layers:
        layer = outer.mlp
        if not isinstance(layer, MoELayer):
            continue
        if model.config.router_aux_loss or model.config.router_z_loss:
            layer.router.losses = RouterLosses(
                aux_coefficient=model.config.router_aux_loss,
                z_coefficient=model.config.router_z_loss,
                top_k=model.config.moe_router_topk,
                group=model.pg_collection.tp_cp,
                first_token=model.pg_collection.tp.rank(),
            )
            follow_packs(outer, layer.router.losses)
        # megatron-core makes it on the CPU, and moves it at the first forward.
        for parameter in layer.router.parameters():
            parameter.data = parameter.data.to(device)
        gate = None if layer.shared_experts is None else layer.shared_experts.gate_weight
        if gate is not None:
            gate.data = gate.data.to(device)
        if device.type == "cpu":
            layer.token_dispatcher = CpuTokenDispatcher(
                layer.num_local_experts,
                layer.local_expert_indices,
                config=layer.config,
                pg_collection=model.pg_collection,
            )
        for weight in layer.experts.parameters():
            # For the gradient norm: each rank has weights of its own. megatron-core marks them by their linear's kind.
            weight.tensor_model_parallel = True
            # For the groups over which gradients are summed. megatron-core looks at ``expert`` alone; where experts are
            # whole on each of several tensor ranks, their gradients have to be summed over these, too.
            weight.allreduce = not layout.splits_experts
            # An expert sees all of its tokens. megatron-core marks a bias as one of a part of the sequence, and would
            # add those of different experts on the tensor ranks.
            weight.sequence_parallel = False


def router_losses(chunks: Iterable[torch.nn.Module]) -> list[RouterLosses]:
    """Of the routers in this rank's chunks of a model; none if it trains without, or has no experts here."""
    routers = (module for chunk in chunks for module in chunk.modules() if isinstance(module, Router))
    return [router.losses for router in routers if router.losses is not None]
