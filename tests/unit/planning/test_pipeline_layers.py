"""Which layers the stages get: as fast as can be where they do not divide, as before where they do, or as given."""

from itertools import product
from pathlib import Path

import pytest
from transformers import PretrainedConfig

from megatron_tgdpo.distributed.layout import ParallelLayout, make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.planning.activations import Pack, stage_layers
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Batch, Job
from megatron_tgdpo.planning.layouts import all_plans, make_plan
from megatron_tgdpo.planning.memory import FrozenSource, Sources, stage_memory, stage_parameters
from megatron_tgdpo.planning.pipeline_layers import fit_layout
from megatron_tgdpo.planning.report import plan_text, schedules_table
from megatron_tgdpo.planning.step_time import pack_flops, step_time
from tests.published_configs import PUBLISHED, write_config

PACK = Pack(tokens=4096, sequence_tokens=2048, dtype_bytes=2)
BATCH = Batch(global_pairs=128, pair_tokens=2048, response_share=0.5, shared_prompts=False)


def gemma(tmp_path: Path, layers: int) -> PretrainedConfig:
    """Gemma-2 with the layers of one of its sizes."""
    values = {**PUBLISHED["gemma-2-2b"], "num_hidden_layers": layers}
    (tmp_path / str(layers)).mkdir(exist_ok=True)
    return read_hf_config(write_config(tmp_path / str(layers), values))


def slowest(job: Job, layout: ParallelLayout, recompute: str = "none") -> float:
    return max(sum(pack_flops(job, layout, recompute, stage)) for stage in range(layout.pipeline))


def grid(stages: int, virtual: int = 1) -> ParallelLayout:
    return make_layout(1, stages, 1, False, stages, virtual)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("layers", "guide_layers", "stages"), [(7, 8, 3), (6, 9, 4), (9, 5, 4), (5, 3, 2)])
def test_no_split_has_a_faster_slowest_stage(
    tmp_path: Path, layers: int, guide_layers: int, stages: int, recompute: str
) -> None:
    policy, guide = gemma(tmp_path, layers), gemma(tmp_path, guide_layers)
    alone, all_three = Job(policy, (policy,), PACK, BATCH), Job(policy, (policy, guide), PACK, BATCH)
    given: dict[str, list[int]] = {}
    for job, depth, roles in ((alone, layers, ("policy", "reference")), (all_three, guide_layers, ("guide",))):
        found = fit_layout(job, grid(stages), recompute)
        assert given.items() <= found.unequal.items()
        others = [list(sizes) for sizes in product(range(1, depth), repeat=stages) if sum(sizes) == depth]
        best = min(
            slowest(job, fit_layout(job, grid(stages), recompute, given | dict.fromkeys(roles, sizes)), recompute)
            for sizes in others
        )
        assert slowest(job, found, recompute) == pytest.approx(best, rel=1e-12)
        given = found.unequal


@pytest.mark.parametrize("layers", [26, 30, 42, 46])
def test_published_depths_on_four_stages(tmp_path: Path, layers: int) -> None:
    model = gemma(tmp_path, layers)
    job = Job(model, (model, model), PACK, BATCH)
    layout = fit_layout(job, grid(4), "none")
    assert layout.unequal == dict.fromkeys(("policy", "reference", "guide"), layout.unequal["policy"])
    sizes = layout.unequal["policy"]
    assert sum(sizes) == layers
    # The log-probs of 256,000 words weigh as much as several layers.
    assert sizes[3] < sizes[0] - 1
    assert max(sizes[:3]) - min(sizes[:3]) <= 1
    held = [layer for stage in range(4) for layer in stage_layers(model, layout, stage)]
    assert held == list(range(layers))
    whole = stage_parameters(model, grid(1), 0)
    tied = model.vocab_size * model.hidden_size
    assert sum(stage_parameters(model, layout, stage) for stage in range(4)) == whole + tied


def test_layers_that_divide_are_as_they_were(tmp_path: Path) -> None:
    model, guide = gemma(tmp_path, 28), gemma(tmp_path, 26)
    assert fit_layout(Job(model, (model, model), PACK, BATCH), grid(4), "none") == grid(4)
    layout = fit_layout(Job(model, (model, guide), PACK, BATCH), grid(4), "none")
    assert layout.layers[:2] == ((), ())
    assert sum(layout.layers[2]) == 26
    assert layout.of_model(2).part_layers(26) == layout.layers[2]
    assert layout.of_model(0).part_layers(28) == (7, 7, 7, 7)
    with pytest.raises(ValueError, match="of which sizes"):
        layout.part_layers(26)


def test_given_layers(tmp_path: Path) -> None:
    model, guide = gemma(tmp_path, 8), gemma(tmp_path, 6)
    job = Job(model, (model, guide), PACK, BATCH)
    # The reference is as deep as the policy; the guide divides.
    layout = fit_layout(job, grid(2), "none", {"policy": [5, 3]})
    assert layout.layers == ((5, 3), (5, 3), ())
    layout = fit_layout(job, grid(2), "none", {"policy": [5, 3], "reference": [4, 4], "guide": [1, 5]})
    assert layout.layers == ((5, 3), (4, 4), (1, 5))
    with pytest.raises(UserError, match=r"pipeline_layers\.guide \[5, 3\] has 8 layers and model\.guide 6"):
        fit_layout(job, grid(2), "none", {"guide": [5, 3]})
    shared = Job(model, (model, model), PACK, BATCH, sources=Sources(None, (FrozenSource(), FrozenSource(shared=True))))
    with pytest.raises(UserError, match=r"guide is \[6, 2\], but model.guide has the weights of"):
        fit_layout(shared, grid(2), "none", {"policy": [4, 4], "reference": [3, 5], "guide": [6, 2]})
    assert fit_layout(shared, grid(2), "none", {"reference": [3, 5], "guide": [3, 5]}).layers[0] == ()


def test_chunks_of_unequal_stages(tmp_path: Path) -> None:
    model = gemma(tmp_path, 11)
    layout = fit_layout(Job(model, (), PACK, BATCH), grid(2, virtual=3), "none", {"policy": [6, 5]})
    assert layout.part_layers(11) == (2, 1, 2, 2, 2, 2)
    assert stage_layers(model, layout, 0) == [0, 1, 3, 4, 7, 8]
    assert stage_layers(model, layout, 1) == [2, 5, 6, 9, 10]


def test_plans_know_unequal_stages(tmp_path: Path) -> None:
    model = gemma(tmp_path, 26)
    job, cluster = Job(model, (model, model), PACK, BATCH), Cluster()
    plan = make_plan(job, cluster, make_layout(1, 4, 1, True, 8), "none")
    text = plan_text(plan, job, cluster)
    sizes = "+".join(map(str, plan.layout.unequal["policy"]))
    assert f"stages: policy {sizes} layers, reference {sizes} layers, guide {sizes} layers" in text
    held = [stage_memory(model, [model, model], plan.layout, PACK, "none", stage).total for stage in range(4)]
    assert plan.memory.total == max(held)
    # With as many layers on each, all would wait for the last.
    given = {role: [7, 7, 6, 6] for role in ("policy", "reference", "guide")}
    even = make_plan(job, cluster, make_layout(1, 4, 1, True, 8), "none", given)
    assert plan.time.total < 0.8 * even.time.total
    assert {plan.layout.pipeline for plan in all_plans(job, cluster)} == {1, 2, 4, 8}
    assert len(schedules_table(job, cluster, 1, False, "none").splitlines()) == 2 + 3 * 4


def test_backward_waits_for_its_own_traffic(tmp_path: Path) -> None:
    """Of slow links the policy's backward takes as long as its traffic; frozen models have less of it."""
    model = gemma(tmp_path, 26)
    job, slow = Job(model, (), PACK, BATCH), Cluster(nvlink_gbytes=1.0)
    layout = fit_layout(job, make_layout(2, 2, 1, True, 8), "none")
    time = step_time(job, slow, layout, "none")
    assert time.bubble < time.tensor
    assert time.tensor > 10 * time.compute
