"""Which layers each pipeline stage gets, of every model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from heapq import heapify, heapreplace

from transformers import PretrainedConfig

from megatron_tgdpo.distributed.layout import ROLES, ParallelLayout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.divisibility import check_layout
from megatron_tgdpo.models.hf_weights.mapping import kinds_of_layers
from megatron_tgdpo.planning.activations import Pack
from megatron_tgdpo.planning.job import Batch, Job
from megatron_tgdpo.planning.step_time import model_flops

Given = Mapping[str, Sequence[int] | None]


def fit_layout(job: Job, layout: ParallelLayout, recompute: str, given: Given | None = None) -> ParallelLayout:
    """The layout with the layers that each stage has of every model.

    A model whose layers divide by the stages has as many on each. Of others, the policy first, layer after layer goes
    to the stage whose pack then takes least, beside the models that are in the stages already: as all layers of a model
    cost the same, no split has a faster slowest stage. Those with experts and those without are made to cost about the
    same, and count as the mean. Counted are the products of ``step_time.py``, those of the log-probs of all models on
    the last stage among them; the look-up of the embedding and the norms have none. Models with as many layers are
    split alike, as they must be where they share weights.

    Args:
        job: The models, and what a pack is.
        layout: The parallel layout.
        recompute: ``train.recompute``.
        given: ``parallel.pipeline_layers``, by role.

    Raises:
        UserError: A model does not divide by the tensor ranks, has fewer layers than the layout parts, or not those
            that are given.
    """
    models = dict(zip(ROLES, job.models, strict=False))
    check_layout(models, layout)
    flops = [model_flops(job, number, recompute) for number in range(len(job.models))]
    costs = [_mean_layer(job, number, recompute) for number in range(len(job.models))]
    found: dict[str, tuple[int, ...]] = {}
    for role, hf_config in models.items():
        listed, layers = (given or {}).get(role), hf_config.num_hidden_layers
        if listed is not None:
            _check(role, listed, layers, job, found, models)
            found[role] = tuple(listed)
            continue
        like = [found[other] for other in found if models[other].num_hidden_layers == layers]
        # Nothing need be said of equal parts, unless an equally deep model has others.
        found[role] = like[0] if like else ()
    # What each stage's pack takes without the models that are still to be split.
    busy = [0.0] * layout.pipeline
    busy[-1] = sum(each.logits for each in flops)
    left: dict[int, float] = {}
    for (role, hf_config), layer_cost in zip(models.items(), costs, strict=True):
        layers = hf_config.num_hidden_layers
        if found[role] or layers % layout.parts == 0:
            sizes = found[role] or (layers // layout.pipeline,) * layout.pipeline
            busy = [taken + count * layer_cost for taken, count in zip(busy, sizes, strict=True)]
        else:
            left[layers] = left.get(layers, 0.0) + layer_cost
    for layers, cost in left.items():
        sizes = _balanced(layers, cost, busy, least=layout.virtual)
        busy = [taken + count * cost for taken, count in zip(busy, sizes, strict=True)]
        found |= {
            role: sizes for role, config in models.items() if config.num_hidden_layers == layers and not found[role]
        }
    return replace(layout, layers=tuple(found.values()) if any(found.values()) else ())


def _mean_layer(job: Job, number: int, recompute: str) -> float:
    """FLOP of a model's layer, forwards and backwards, of one pack."""
    kinds = kinds_of_layers(job.models[number])
    total = sum(count * model_flops(job, number, recompute, layer).layer for layer, count in kinds.items())
    return total / sum(kinds.values())


def fit_one(hf_config: PretrainedConfig, layout: ParallelLayout) -> ParallelLayout:
    """As :func:`fit_layout`, of one model that does not train, whatever its packs."""
    return fit_layout(Job(hf_config, (), Pack(1, 1, 4), Batch(1, 1, 0.5, False)), layout, "none")


def _balanced(layers: int, cost: float, busy: Sequence[float], least: int) -> tuple[int, ...]:
    """Layers of each stage, so that the slowest is as fast as can be.

    Args:
        layers: Of the model.
        cost: Of a layer.
        busy: What each stage takes without it.
        least: Layers that every stage must have.
    """
    sizes = [least] * len(busy)
    # Of stages that would take the same, the later one: it keeps the activations of fewer micro batches.
    heap = [(taken + (least + 1) * cost, -stage) for stage, taken in enumerate(busy)]
    heapify(heap)
    for _ in range(layers - least * len(busy)):
        after, stage = heap[0]
        sizes[-stage] += 1
        heapreplace(heap, (after + cost, stage))
    return tuple(sizes)


def _check(
    role: str,
    listed: Sequence[int],
    layers: int,
    job: Job,
    found: Mapping[str, tuple[int, ...]],
    models: Mapping[str, PretrainedConfig],
) -> None:
    key = f"parallel.pipeline_layers.{role}"
    if sum(listed) != layers:
        raise UserError(f"{key} {list(listed)} has {sum(listed)} layers and model.{role} {layers}: change the list")
    number = ROLES.index(role)
    if number and job.sources.frozen and job.sources.frozen[number - 1].shared:
        equal = (layers // len(listed),) * len(listed)
        alike = [sizes or equal for other, sizes in found.items() if models[other].num_hidden_layers == layers]
        if tuple(listed) not in alike:
            raise UserError(
                f"{key} is {list(listed)}, but model.{role} has the weights of a model that is in the stages already: "
                "set it to null, for that model's"
            )
