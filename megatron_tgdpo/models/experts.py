"""Experts in the MLP's place: megatron-core's layer, made exact, and usable without a GPU.

Every token goes to all experts that its router chooses; none is dropped, whatever their load. Source: megatron-core
0.16.1 ``transformer/moe``.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.models.config import LanguageModelConfig
from megatron_tgdpo.models.router_losses import RouterLosses, follow_packs


class Router(TopKRouter):
    """megatron-core's router with logits in fp32, from products of any PyTorch.

    Its own function for them asks for Transformer Engine's, by a name that is not bound without it.

    Attributes:
        losses: Of a model that trains with them; else None.
        expert_bias: [experts] float32, what :func:`choose_experts` adds to scores, or None. megatron-core's own
            would be on a GPU, and follow the experts' loads; this is a weight that does not train.
    """

    losses: RouterLosses | None = None

    def __init__(self, config: LanguageModelConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        if config.router_score_bias:
            self.expert_bias = torch.nn.Parameter(torch.zeros(config.num_moe_experts or 0), requires_grad=False)

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[S_local, 1, experts] logits -> [S_local, experts]: weights in float32, and whether a token goes there."""
        flat, scores = logits.view(-1, logits.shape[-1]), None
        if self.config.moe_router_score_function == "sigmoid" or self.config.moe_router_num_groups:
            weights, routed, scores = choose_experts(flat, self.config, self.expert_bias)
        else:
            weights, routed = super().routing(logits, *args, **kwargs)
        if self.losses is not None and torch.is_grad_enabled():
            probabilities = flat.softmax(dim=-1) if scores is None else scores / scores.sum(dim=-1, keepdim=True)
            weights = self.losses.attach(weights, flat, routed, probabilities)
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


def choose_experts(logits: Tensor, config: LanguageModelConfig, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """To which experts tokens go, by softmax or sigmoid scores, of groups of experts those that are best for a token.

    A group is as good as its ``router_group_best`` best experts together. Tokens go to the experts with the highest
    scores in the ``moe_router_group_topk`` best groups; ``bias`` counts for the choice alone. Their weights are the
    scores, normalised to a sum of 1 if ``router_normalised``, times ``moe_router_topk_scaling_factor``.

    Source: DeepSeek-V2 (arXiv 2405.04434) section 2.2.2, DeepSeek-V3 (arXiv 2412.19437) eq. 13 to 16; transformers
    5.24 ``DeepseekV2TopkRouter``, ``DeepseekV3TopkRouter``, ``Glm4MoeTopkRouter``.

    Args:
        logits: [T, E] float32.
        config: The model's.
        bias: [E] float32, or None.

    Returns:
        [T, E]: weights in float32, 0 where a token does not go; whether it goes there; the scores without bias.
    """
    scores = logits.sigmoid() if config.moe_router_score_function == "sigmoid" else logits.softmax(dim=-1)
    ranked = scores if bias is None else scores + bias
    if config.moe_router_num_groups:
        groups = ranked.unflatten(1, (config.moe_router_num_groups, -1))  # [T, groups, E / groups]
        worth = groups.topk(config.router_group_best, dim=-1).values.sum(dim=-1)
        best = torch.zeros_like(worth, dtype=torch.bool)
        best.scatter_(1, worth.topk(config.moe_router_group_topk, dim=-1).indices, True)
        ranked = groups.masked_fill(~best.unsqueeze(-1), -torch.inf).flatten(1)
    experts = ranked.topk(config.moe_router_topk, dim=-1).indices
    weights = scores.gather(1, experts)
    if config.router_normalised:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    weights = weights * (config.moe_router_topk_scaling_factor or 1.0)
    routed = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)
    return torch.zeros_like(logits).scatter(1, experts, weights), routed, scores


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
