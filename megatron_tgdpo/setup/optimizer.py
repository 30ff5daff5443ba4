"""megatron-core's distributed optimizer, and an Adam whose step count survives its checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_tgdpo.config.schema import OptimizerSettings


class GroupStepAdamW(torch.optim.AdamW):
    """torch's AdamW with one step count per parameter group, as apex's and Transformer Engine's Adam keep it.

    megatron-core 0.16 neither saves nor restores torch's per-parameter counts with a distributed optimizer (it stumbles
    over them while loading). Here they exist only inside :meth:`step` and in the state dict.
    """

    @classmethod
    def taking_over(cls, other: torch.optim.Optimizer) -> "GroupStepAdamW":
        """The same parameter groups, in the same list objects, before any step.

        megatron-core's fp32 shards are views of parameters, which torch's constructor refuses and its steps accept.
        """
        optimizer = cls([torch.nn.Parameter(torch.zeros(0))])
        optimizer.param_groups = other.param_groups
        for group in optimizer.param_groups:
            # Groups of other packages' Adam lack some of torch's options.
            for name, value in optimizer.defaults.items():
                group.setdefault(name, value)
            # One pass over the parameters instead of ten.
            group["fused"] = True
        return optimizer

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if self.state[param]:
                    self.state[param]["step"] = torch.tensor(float(group.get("step", 0)), device=param.device)
        result = super().step(closure)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                self.state[param].pop("step", None)
        return result

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for group in state["param_groups"]:
            for index in group["params"]:
                if index in state["state"]:
                    count = torch.tensor(float(group.get("step", 0)))
                    state["state"][index] = {**state["state"][index], "step": count}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for values in self.state.values():
            values.pop("step", None)


def _initialise(adam: Any) -> None:
    """What megatron-core's own function does, which leaves out an argument that Transformer Engine asks for."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            adam.initialize_state(parameter, adam.store_param_remainders and parameter.dtype == torch.bfloat16)


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    settings: OptimizerSettings,
    dtype: torch.dtype,
    pg: ProcessGroupCollection,
    *,
    fused: bool = True,
    options: Mapping[str, Any] | None = None,
) -> ChainedOptimizer:
    """megatron-core's distributed Adam over the policy's parameters; its state is split over data ranks.

    The distributed optimizer is used for one data rank too, so that every layout writes the same checkpoint. Experts
    that are split otherwise than the rest of the model have an optimizer of their own, over their own data ranks; it
    comes second.

    Args:
        model: The wrapped model.
        settings: Adam and clipping.
        dtype: Of the parameters.
        pg: Process groups.
        fused: Whether Adam may be apex's or Transformer Engine's where megatron-core finds one; else it is torch's.
        options: Further arguments of megatron-core's OptimizerConfig.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=0.0,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        **(options or {}),
    )
    chained = get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False)
    assert isinstance(chained, ChainedOptimizer)
    for optimizer in chained.chained_optimizers:
        assert isinstance(optimizer, DistributedOptimizer)
        if isinstance(optimizer.optimizer, torch.optim.AdamW) or not (fused or config.optimizer_cpu_offload):
            optimizer.optimizer = GroupStepAdamW.taking_over(optimizer.optimizer)
        if optimizer.init_state_fn is not None:
            # Moments exist from the start, so that a fresh optimizer can receive a checkpoint's.
            if config.use_precision_aware_optimizer:
                _initialise(optimizer.optimizer)
            else:
                optimizer.init_state_fn(optimizer.optimizer, config)
    return chained
