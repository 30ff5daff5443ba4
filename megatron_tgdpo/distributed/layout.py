"""The grid of ranks: which layout, which process groups."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_tgdpo.errors import UserError

# A plan needs layouts without groups: megatron-core and torch are imported where groups are made.
if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


# The models, in the order in which a layout has their layers.
ROLES = ("policy", "reference", "guide")


@dataclass(frozen=True)
class ParallelLayout:
    """How the ranks are split; ``data`` follows from the world size.

    Every pipeline stage holds ``virtual`` chunks of consecutive layers: chunk c of stage s is part c x pipeline + s of
    pipeline x virtual parts of the model.

    Experts are split otherwise: the tensor x context x data ranks of a stage, in this order, are expert_tensor x
    expert x expert_data ranks to them. ``expert`` ranks have different experts, ``expert_tensor`` ranks share each
    (None: as ``tensor``), and what is left has the same.

    Attributes:
        layers: Layers of each stage, of policy, reference and guide in this order; of a model without, or with none
            (``()``), the parts are equal. What takes the layout of one model reads the first: see :meth:`of_model`.
    """

    tensor: int
    pipeline: int
    context: int
    data: int
    sequence_parallel: bool
    virtual: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    layers: tuple[tuple[int, ...], ...] = ()

    @property
    def expert_shards(self) -> int:
        """Ranks that share each expert."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def expert_data(self) -> int:
        """Ranks of a stage that have the same part of the same experts."""
        return self.tensor * self.context * self.data // (self.expert_shards * self.expert)

    @property
    def splits_experts(self) -> bool:
        """Whether experts are on other ranks than the rest of the model, in groups of their own."""
        return self.expert > 1 or self.expert_shards != self.tensor

    @property
    def expert_keys(self) -> dict[str, int]:
        """What section ``parallel`` of a config says of experts; nothing where they are split as all else is."""
        return {"expert": self.expert, "expert_tensor": self.expert_shards} if self.splits_experts else {}

    @property
    def keys(self) -> dict[str, Any]:
        """What section ``parallel`` of a config says of it; chunks, context ranks and experts only where there are."""
        return {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            **({"pipeline_layers": self.unequal} if self.unequal else {}),
            **({"context": self.context} if self.context > 1 else {}),
            **({"virtual_pipeline": self.virtual} if self.virtual > 1 else {}),
            "sequence_parallel": self.sequence_parallel,
            **self.expert_keys,
        }

    @property
    def parts(self) -> int:
        """Into how many parts of consecutive layers a model is divided."""
        return self.pipeline * self.virtual

    def of_model(self, number: int) -> "ParallelLayout":
        """The layout of one model: 0 the policy, 1 the reference, 2 the guide."""
        return replace(self, layers=self.layers[number : number + 1])

    def part_layers(self, layers: int) -> tuple[int, ...]:
        """How many of a model's layers each part has, in the model's order; a stage's chunks are as equal as can be.

        Raises:
            ValueError: The layers are not divisible by the parts, and no numbers are given.
        """
        given = self.layers[0] if self.layers else ()
        if not given:
            if layers % self.parts:
                raise ValueError(f"{layers} layers in {self.parts} parts: of which sizes?")
            return (layers // self.parts,) * self.parts
        return tuple(
            of_stage * (chunk + 1) // self.virtual - of_stage * chunk // self.virtual
            for chunk in range(self.virtual)
            for of_stage in given
        )

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def __str__(self) -> str:
        cp = f" x CP{self.context}" if self.context > 1 else ""
        sp = " + SP" if self.sequence_parallel else ""
        vpp = f" in {self.virtual} chunks" if self.virtual > 1 else ""
        ep = f", experts EP{self.expert} x TP{self.expert_shards}" if self.splits_experts else ""
        return f"TP{self.tensor} x PP{self.pipeline}{vpp}{cp} x DP{self.data}{sp}{ep}"

    @property
    def unequal(self) -> dict[str, list[int]]:
        """Layers of each stage by role, of the models whose stages are given: ``parallel.pipeline_layers``."""
        return {role: list(sizes) for role, sizes in zip(ROLES, self.layers, strict=False) if sizes}

    def describe_layers(self) -> str:
        """Which layers the stages of unequal ones have, as ``policy 8+8+7+3 layers``; empty where all are equal."""
        return ", ".join(f"{role} {'+'.join(map(str, sizes))} layers" for role, sizes in self.unequal.items())


def make_layout(
    tensor: int,
    pipeline: int,
    context: int,
    sequence_parallel: bool,
    world_size: int,
    virtual: int = 1,
    expert: int = 1,
    expert_tensor: int | None = None,
) -> ParallelLayout:
    """Builds the layout for a world size.

    Raises:
        UserError: The world size is not a multiple of tensor x pipeline x context, or the ranks of a stage not of
            expert_tensor x expert.
    """
    model_size = tensor * pipeline * context
    if world_size % model_size:
        below = world_size - world_size % model_size
        choices = f"{below} or {below + model_size}" if below else f"{model_size}"
        raise UserError(
            f"world size {world_size} is not divisible by parallel.tensor x pipeline x context = "
            f"{tensor} x {pipeline} x {context} = {model_size}: start {choices} ranks, or change the layout"
        )
    # With one tensor rank there is no sequence to split; mcore would reject the flag.
    data = world_size // model_size
    layout = ParallelLayout(
        tensor, pipeline, context, data, sequence_parallel and tensor > 1, virtual, expert, expert_tensor
    )
    ranks, shards = tensor * context * data, layout.expert_shards
    if ranks % (shards * expert):
        raise UserError(
            f"the {ranks} ranks of a stage (tensor x context x data) are not divisible by parallel.expert_tensor x "
            f"expert = {shards} x {expert} = {shards * expert}: lower parallel.expert, or set parallel.expert_tensor=1"
        )
    return layout


def init_model_parallel(layout: ParallelLayout, seed: int, timeout_minutes: float) -> "ProcessGroupCollection":
    """Creates megatron-core's process groups for a layout (collective over all ranks) and seeds its RNG tracker.

    Returns:
        The groups to be passed around: tp, pp, cp, dp, dp_cp, mp, embd, pos_embd, ep, expt_tp, expt_dp and mcore's
        others.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_shards,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
        # Twins of the groups above, which nothing here uses.
        create_gloo_process_groups=False,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def destroy_model_parallel() -> None:
    """Forgets the layout, so that another one can be initialised in the same process (tests, converters)."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
