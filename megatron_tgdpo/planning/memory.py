"""Parameters and memory per rank, computed from configs alone (for ``--dry-run`` and the planner)."""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from transformers import PretrainedConfig

from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.models.families import SameConfig
from megatron_tgdpo.models.hf_weights.adapter_layout import Lora, adapted_parts, fused_linears, linear_shapes
from megatron_tgdpo.models.hf_weights.mapping import (
    EMBEDDING,
    Experts,
    GlobalParameter,
    global_parameters,
    kinds_of_layers,
)
from megatron_tgdpo.planning.activations import Pack, stage_activations, stage_layers
from megatron_tgdpo.planning.workspace import (
    carried_states,
    frozen_workspace,
    kept_logits,
    layer_workspace,
    logprob_workspace,
)

GIB = 2**30
_FP32 = 4


@dataclass(frozen=True)
class RankMemory:
    """Of one rank; bytes.

    Attributes:
        stage: Its pipeline stage, from 0.
        policy_parameters: Policy parameters on that rank.
        trained_parameters: Those of them that train: all, or an adapter's.
        frozen_parameters: Reference and guide parameters on that rank, without those that another model has.
        weights: Policy weights, with FP8 copies of them.
        gradients: fp32 gradient buffer of what trains.
        optimizer: Adam moments, and the main copy of bf16 weights, of what trains, split over data and context
            ranks; of experts over those that have the same.
        frozen: Weights of reference and guide.
        activations: What the policy's layers keep for backward, for all micro batches in flight.
        carried: Hidden states of one pack that travel between stages.
        workspace: What comes and goes within a layer or the log-probs, at its peak.
        save: Host memory that a checkpoint takes until it is written: this rank's part of weights, fp32 main copy and
            moments. Not part of the total.
    """

    stage: int
    policy_parameters: int
    trained_parameters: int
    frozen_parameters: int
    weights: int
    gradients: int
    optimizer: int
    frozen: int
    activations: int
    carried: int
    workspace: int
    save: int

    @property
    def static(self) -> int:
        """What is allocated for the whole run."""
        return self.weights + self.gradients + self.optimizer + self.frozen

    @property
    def total(self) -> int:
        return self.static + self.activations + self.carried + self.workspace


@dataclass(frozen=True)
class StateBytes:
    """What a trained parameter takes in the optimizer.

    Attributes:
        main: Bytes of its main copy; 0 for fp32 weights, which are that themselves.
        moments: Bytes of both moments.
    """

    main: int
    moments: int


# Of both moments of a parameter, by ``optimizer.moments``.
MOMENT_BYTES = {"fp32": 8, "bf16": 4, "fp8": 3}


@dataclass(frozen=True)
class Savings:
    """What a run can do without beyond recomputation, which no ranking takes unless nothing fits without.

    Attributes:
        moments: ``optimizer.moments``.
        offload_frozen: ``offload.frozen``.
    """

    moments: str = "fp32"
    offload_frozen: bool = False

    @property
    def keys(self) -> dict[str, dict[str, str | bool]]:
        """What a config says of them, by section; nothing of what is as by default."""
        found: dict[str, dict[str, str | bool]] = {}
        if self.moments != "fp32":
            found["optimizer"] = {"moments": self.moments}
        if self.offload_frozen:
            found["offload"] = {"frozen": True}
        return found

    def __str__(self) -> str:
        """As overrides of a config."""
        pairs = ((section, *each) for section, values in self.keys.items() for each in values.items())
        return " ".join(f"{section}.{key}={str(value).lower()}" for section, key, value in pairs)

    def state_bytes(self, dtype_bytes: int) -> StateBytes:
        """Of a parameter in the optimizer."""
        return StateBytes(main=0 if dtype_bytes == _FP32 else _FP32, moments=MOMENT_BYTES[self.moments])


NO_SAVINGS = Savings()


@dataclass(frozen=True)
class LinearBytes:
    """What a weight of the layers' linears takes on the device where they compute in FP8 or FP4.

    Attributes:
        policy: Bytes in the policy, with the copies that its products read; None where it computes in its dtype.
        frozen: The same of reference and guide.
        plain_ends: The first and the last layer compute in their dtype.
    """

    policy: float | None = None
    frozen: float | None = None
    plain_ends: bool = False


@dataclass(frozen=True)
class FrozenSource:
    """What a frozen model is made of.

    Attributes:
        adapter: A LoRA adapter, or None.
        shared: Whether its base is in memory anyway, as the policy's or another frozen model's.
    """

    adapter: Lora | None = None
    shared: bool = False


@dataclass(frozen=True)
class Sources:
    """What models are made of, as far as LoRA goes.

    Attributes:
        trained: The adapter that the policy trains; None where all of its weights train.
        frozen: Of reference and guide; empty where each is a whole model of its own.
    """

    trained: Lora | None = None
    frozen: tuple[FrozenSource, ...] = ()

    @classmethod
    def of(
        cls, policy_base: Hashable, trained: Lora | None, frozen: Iterable[tuple[Hashable, Lora | None]]
    ) -> "Sources":
        """From what each model is made of.

        A base is in memory once for all frozen models that have it, and for a policy that is an adapter on it; a policy
        whose weights all train shares them with nobody.

        Args:
            policy_base: Whatever tells the policy's base from others.
            trained: The adapter that the policy trains.
            frozen: Of reference and guide: the same of each, and its adapter.
        """
        bases = set() if trained is None else {policy_base}
        found = []
        for base, adapter in frozen:
            found.append(FrozenSource(adapter, base in bases))
            bases.add(base)
        return cls(trained, tuple(found))


def fullest_stages(layout: ParallelLayout) -> Sequence[int]:
    """The stages of which one holds most: of equal ones the first, with most micro batches in flight, or the last."""
    return range(layout.pipeline) if layout.layers else sorted({0, layout.pipeline - 1})


# A ranking asks for the same few thousands of times.
@lru_cache(maxsize=64)
def _listed(same: SameConfig, tensor: int) -> tuple[GlobalParameter, ...]:
    return tuple(global_parameters(same.hf_config, tensor, every_expert=False))


def _parameters(hf_config: PretrainedConfig, tensor: int = 1) -> tuple[GlobalParameter, ...]:
    """All parameters for so many tensor ranks, of experts those of the first."""
    return _listed(SameConfig(hf_config), tensor)


def stage_linears(hf_config: PretrainedConfig, layout: ParallelLayout, stage: int, *, plain_ends: bool) -> int:
    """Weights of the layers' linears that one rank of a pipeline stage holds, of those that may compute in FP8."""
    layers = set(stage_layers(hf_config, layout, stage))
    if plain_ends:
        layers -= {0, hf_config.num_hidden_layers - 1}
    held = (one for one in _parameters(hf_config) if one.layer in layers and one.expert is None)
    return sum(math.prod(parameter.shape) for parameter in held if len(parameter.shape) == 2) // layout.tensor


def stage_parameters(hf_config: PretrainedConfig, layout: ParallelLayout, stage: int) -> int:
    """Parameters that one rank of a pipeline stage holds, vocabulary padding included."""
    layers = set(stage_layers(hf_config, layout, stage))
    first, last = stage == 0, stage == layout.pipeline - 1
    total = expert_parameters(hf_config, layout, stage)
    for parameter in _parameters(hf_config, layout.tensor):
        if parameter.expert is not None:
            continue
        size = math.prod(parameter.shape) // (1 if parameter.kind == "copy" else layout.tensor)
        if parameter.layer is not None:
            held = parameter.layer in layers
        elif parameter.key == EMBEDDING:
            # The last stage has its own copy of tied embeddings.
            held = first or (last and bool(hf_config.tie_word_embeddings))
        else:
            held = last
        total += size if held else 0
    return total


def resident_parameters(hf_config: PretrainedConfig, layout: ParallelLayout, stage: int) -> int:
    """Of :func:`stage_parameters` those on the device where layers wait elsewhere: two layers at most, and the rest."""
    layers = set(stage_layers(hf_config, layout, stage))
    inside = expert_parameters(hf_config, layout, stage) + sum(
        math.prod(one.shape) // (1 if one.kind == "copy" else layout.tensor)
        for one in _parameters(hf_config, layout.tensor)
        if one.expert is None and one.layer in layers
    )
    return stage_parameters(hf_config, layout, stage) - inside + inside * min(2, len(layers)) // max(len(layers), 1)


def expert_parameters(hf_config: PretrainedConfig, layout: ParallelLayout, stage: int) -> int:
    """Parameters of experts that one rank of a pipeline stage holds; they are part of :func:`stage_parameters`."""
    experts = Experts.of(hf_config)
    if experts is None:
        return 0
    layers = set(stage_layers(hf_config, layout, stage))
    # Biases are whole on each rank of theirs, and with them all of an expert is (``models/divisibility.py``).
    of_first = (one for one in _parameters(hf_config) if one.expert is not None)
    size = sum(math.prod(one.shape) for one in of_first if one.layer in layers)
    return experts.count * size // (layout.expert * layout.expert_shards)


def adapter_parameters(
    hf_config: PretrainedConfig, layout: ParallelLayout, stage: int, lora: Lora, *, of_experts: bool = False
) -> int:
    """Parameters of an adapter that one rank of a pipeline stage holds: see ``models/lora.py: LoraAdapter``.

    Of a linear that megatron-core fused, one adapted part is as large as all. With ``of_experts`` those of experts
    alone.
    """
    kinds = kinds_of_layers(hf_config, stage_layers(hf_config, layout, stage))
    return sum(
        count * _layer_adapter(hf_config, layout, layer, lora, of_experts=of_experts) for layer, count in kinds.items()
    )


def _layer_adapter(
    hf_config: PretrainedConfig, layout: ParallelLayout, layer: int, lora: Lora, *, of_experts: bool
) -> int:
    of_layer = 0
    for fused in fused_linears(hf_config, layer):
        if (of_experts and not fused.experts) or not any(adapted_parts(fused, lora)):
            continue
        shapes = linear_shapes(fused, hf_config)
        outputs, inputs = sum(rows for rows, _ in shapes), shapes[0][1]
        ranks = layout.expert_shards if fused.experts else layout.tensor
        if fused.row_parallel:
            inputs //= ranks
        elif not fused.replicated:
            outputs //= ranks
        each = lora.rank * (len(shapes) * inputs + outputs)
        of_layer += each * fused.experts // layout.expert if fused.experts else each
    return of_layer


def trained_parameters(hf_config: PretrainedConfig, layout: ParallelLayout, stage: int, lora: Lora | None) -> int:
    """Parameters that one rank of a pipeline stage trains: all of the policy's, or its adapter's."""
    if lora is None:
        return stage_parameters(hf_config, layout, stage)
    return adapter_parameters(hf_config, layout, stage, lora)


def trained_of_experts(hf_config: PretrainedConfig, layout: ParallelLayout, stage: int, lora: Lora | None) -> int:
    """Those of :func:`trained_parameters` that belong to experts."""
    if lora is None:
        return expert_parameters(hf_config, layout, stage)
    return adapter_parameters(hf_config, layout, stage, lora, of_experts=True)


def _copied_parameters(hf_config: PretrainedConfig, layout: ParallelLayout, stage: int) -> int:
    """Parameters of :func:`stage_parameters` that another stage saves: the last stage's copy of tied embeddings."""
    if not hf_config.tie_word_embeddings or stage == 0 or stage < layout.pipeline - 1:
        return 0
    (embedding,) = [one for one in _parameters(hf_config, layout.tensor) if one.key == EMBEDDING]
    return math.prod(embedding.shape) // layout.tensor


def stage_memory(
    policy: PretrainedConfig,
    frozen: Sequence[PretrainedConfig],
    layout: ParallelLayout,
    pack: Pack,
    recompute: str,
    stage: int,
    fp8: LinearBytes = LinearBytes(),
    sources: Sources = Sources(),
    state_bytes: StateBytes | None = None,
    offloaded: bool = False,
) -> RankMemory:
    """Memory of a rank of one stage; the arguments are those of :func:`rank_memory`."""
    whole = stage_parameters(policy, layout, stage)
    trained = trained_parameters(policy, layout, stage, sources.trained)
    saved = trained - (_copied_parameters(policy, layout, stage) if sources.trained is None else 0)
    experts = trained_of_experts(policy, layout, stage, sources.trained)
    ranks = layout.data * layout.context
    made_of = sources.frozen or (FrozenSource(),) * len(frozen)
    # Each with the layout that is its own.
    models = [
        (config, layout.of_model(number), source)
        for number, (config, source) in enumerate(zip(frozen, made_of, strict=True), start=1)
    ]
    alone = [(config, own) for config, own, source in models if not source.shared]
    count_held = resident_parameters if offloaded else stage_parameters
    held = [count_held(config, own, stage) for config, own in alone]
    beside = sum(
        adapter_parameters(config, own, stage, source.adapter)
        for config, own, source in models
        if source.adapter is not None
    )
    size = pack.dtype_bytes
    state_bytes = state_bytes or StateBytes(main=0 if size == _FP32 else _FP32, moments=2 * _FP32)
    state = state_bytes.main + state_bytes.moments

    def weights(hf_config: PretrainedConfig, own: ParallelLayout, parameters: int, linear: float | None) -> int:
        if linear is None:
            return parameters * size
        linears = stage_linears(hf_config, own, stage, plain_ends=fp8.plain_ends)
        return round(parameters * size + (linear - size) * linears)

    workspace = max(
        layer_workspace(policy, layout, pack, recompute, sources.trained), frozen_workspace(frozen, layout, pack)
    )
    if stage == layout.pipeline - 1:
        trains = logprob_workspace(policy, layout, pack, weight_trains=sources.trained is None)
        logprobs = [logprob_workspace(config, layout, pack, weight_trains=False) for config in frozen]
        workspace = max(workspace, trains + kept_logits(policy, layout, pack), *logprobs)
    return RankMemory(
        stage=stage,
        policy_parameters=whole + (trained if sources.trained is not None else 0),
        trained_parameters=trained,
        frozen_parameters=sum(held) + beside,
        weights=weights(policy, layout, whole, fp8.policy) + (trained * size if sources.trained is not None else 0),
        gradients=4 * trained,
        optimizer=state * (trained - experts) // ranks + state * experts // layout.expert_data,
        frozen=sum(weights(*each, count, fp8.frozen) for each, count in zip(alone, held, strict=True)) + beside * size,
        activations=round(stage_activations(policy, layout, pack, recompute, stage, sources.trained)),
        carried=round(carried_states(policy, frozen, layout, pack)),
        workspace=round(workspace),
        save=(size + 12) * (saved - experts) // ranks + (size + 12) * experts // layout.expert_data,
    )


def rank_memory(
    policy: PretrainedConfig,
    frozen: Sequence[PretrainedConfig],
    layout: ParallelLayout,
    pack: Pack,
    recompute: str,
    fp8: LinearBytes = LinearBytes(),
    sources: Sources = Sources(),
    state_bytes: StateBytes | None = None,
    offloaded: bool = False,
) -> RankMemory:
    """The fullest rank's memory.

    ``save`` is that of the stage that saves most.

    Args:
        policy: Config of the policy.
        frozen: Configs of reference and guide.
        layout: The parallel layout.
        pack: The micro batch.
        recompute: ``train.recompute``.
        fp8: What weights take where layers compute in FP8.
        sources: What the models are made of.
        state_bytes: Of the optimizer; None: all of it is fp32.
        offloaded: Whether layers of frozen models wait elsewhere for their passes.
    """
    stages = fullest_stages(layout)
    ends = [
        stage_memory(policy, frozen, layout, pack, recompute, stage, fp8, sources, state_bytes, offloaded)
        for stage in stages
    ]
    return replace(max(ends, key=lambda memory: memory.total), save=max(memory.save for memory in ends))
