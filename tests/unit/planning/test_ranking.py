"""Plans of context ranks, chunks and savings: their costs by hand, when they are ranked, and what is said of them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from transformers import PretrainedConfig

from megatron_tgdpo.config.loading import load_config
from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.gpu.optimizer_state import _MOMENTS
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.planning.activations import Pack
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Batch, Job
from megatron_tgdpo.planning.layouts import all_plans, make_plan
from megatron_tgdpo.planning.memory import MOMENT_BYTES, FrozenSource, Savings, Sources
from megatron_tgdpo.planning.moved_bytes import moved_bytes, optimizer_bytes
from megatron_tgdpo.planning.pipeline_schedule import (
    StageCosts,
    interleaved,
    interleaved_order,
    one_f_one_b,
    step_seconds,
)
from megatron_tgdpo.planning.report import plan_text, table
from megatron_tgdpo.planning.step_time import stage_costs, step_time
from megatron_tgdpo.planning.traffic import traffic
from tests.published_configs import PUBLISHED, write_config
from tgdpo.plan import main as tgdpo_plan

ROW = Pack(tokens=4096, sequence_tokens=2048, dtype_bytes=2)
BATCH = Batch(global_pairs=128, pair_tokens=2048, response_share=0.5, shared_prompts=False)


@pytest.fixture
def llama(tmp_path: Path) -> PretrainedConfig:
    return read_hf_config(write_config(tmp_path, PUBLISHED["Llama-3-8B"]))


@pytest.fixture
def job(llama: PretrainedConfig) -> Job:
    return Job(llama, (llama, llama), ROW, BATCH)


def test_traffic_of_context_ranks_by_hand(job: Job) -> None:
    layout, packs = make_layout(2, 4, 4, True, 64), 32
    sent, without = traffic(job, layout, "none"), traffic(job, make_layout(2, 4, 1, True, 16), "none")
    # Of the pack's keys and values (8 groups of 128, half of them here) each rank sends three quarters, in 8 layers:
    # for three models forwards, and back for one.
    keys = 4096 * 2 * 4 * 128 * 2
    assert sent.context == packs * 8 * 3 / 4 * keys * (3 + 1)
    assert traffic(job, layout, "selective").context == sent.context * 5 / 4
    # Ranks have a quarter of the pack, and share what the data ranks share.
    assert (sent.tensor, sent.pipeline) == (without.tensor / 4, without.pipeline / 4)
    assert sent.data == without.data * (7 / 8) / (1 / 2)
    assert without.context == 0


def test_context_ranks_keep_their_part(job: Job) -> None:
    one, four = (make_plan(job, Cluster(), make_layout(2, 1, context, True, 8), "none") for context in (1, 4))
    assert four.memory.activations < one.memory.activations / 3
    assert (four.memory.weights, four.memory.optimizer) == (one.memory.weights, one.memory.optimizer)
    # Two chunks each, over the tensor ranks.
    odd = replace(job, pack=replace(ROW, tokens=4098), pack_given=False)
    assert make_plan(odd, Cluster(), make_layout(2, 1, 4, True, 8), "none").pack_tokens == 4104


@pytest.mark.parametrize("stages", [2, 4])
def test_megatron_takes_chunks_in_this_order(stages: int) -> None:
    for packs in (stages, 3 * stages):
        assert interleaved_order(stages, packs, 2) == get_schedule_table(packs, 2, stages)


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_long_step_is_as_long_as_its_simulation(chunks: int) -> None:
    costs = [StageCosts(1.0, 2.0, 0.5), StageCosts(1.5, 2.5, 0.5), StageCosts(1.0, 2.25, 0.25)]
    for packs in (2, 9, 24, 25) if chunks == 1 else (3, 24):
        whole = (
            one_f_one_b(costs, packs, colocated=True)
            if chunks == 1
            else interleaved(costs, packs, chunks, colocated=True)
        )
        assert step_seconds(costs, packs, chunks) == pytest.approx(whole.step_time)


def test_ranking_has_context_ranks_and_chunks(job: Job) -> None:
    few = replace(job, batch=replace(BATCH, global_pairs=16))
    plans = all_plans(few, Cluster())
    assert {plan.layout.context for plan in plans} == {1, 2, 4, 8}
    chunked = [plan for plan in plans if plan.layout.virtual > 1]
    assert chunked
    for plan in chunked:
        whole = next(each for each in plans if each.layout == replace(plan.layout, virtual=1))
        assert plan.time.total < whole.time.total
        assert plan.traffic.pipeline == plan.layout.virtual * whole.traffic.pipeline
    assert {(plan.layout.context, plan.layout.virtual) for plan in all_plans(few, Cluster(), plain=True)} == {(1, 1)}
    assert all(plan.savings == Savings() for plan in plans)


def test_too_small_a_batch_is_said_with_one_that_is_not(job: Job) -> None:
    for layout in (make_layout(1, 1, 1, False, 128), make_layout(1, 4, 1, False, 128)):
        text = make_plan(job, Cluster(16), layout, "full").warning
        (pairs,) = re.findall(r"raise batch\.global_pairs to ([\d,]+)", text)
        more = replace(job, batch=replace(BATCH, global_pairs=int(pairs.replace(",", ""))))
        assert make_plan(more, Cluster(16), layout, "full").warning == ""
    chunks = make_layout(1, 4, 1, False, 24, 2)
    assert make_plan(job, Cluster(3), chunks, "full").warning == (
        "of 12 packs of a rank some are empty, for chunks take 4 at a time"
    )


def test_savings_are_tried_where_nothing_fits(job: Job) -> None:
    small = Cluster(gpu_memory_gib=24)
    assert not any(plan.fits for plan in all_plans(job, small, plain=True))
    plans = [plan for plan in all_plans(job, small) if plan.fits]
    assert all(str(plan.savings) in table([plan]) for plan in plans)
    moments, offloaded = (
        next(plan for plan in plans if plan.savings.keys.get(key)) for key in ("optimizer", "offload")
    )
    for plan in (moments, offloaded):
        without = make_plan(job, small, replace(plan.layout, layers=()), plan.recompute)
        assert not without.fits
        assert plan.time.total >= without.time.total
        assert (plan.memory.optimizer < without.memory.optimizer) == (plan.savings.moments != "fp32")
        assert (plan.memory.frozen < without.memory.frozen) == plan.savings.offload_frozen
    # An adapter's reference is the policy's base, which stays where it is; fp32 weights have fp32 moments.
    sources = Sources(None, (FrozenSource(shared=True), FrozenSource(shared=True)))
    for other in (replace(job, sources=sources), replace(job, pack=replace(ROW, dtype_bytes=4))):
        offloads = other.pack.dtype_bytes == 4
        for plan in all_plans(other, Cluster(gpus_per_node=2, gpu_memory_gib=8)):
            assert plan.savings.moments == "fp32" or not offloads
            assert not plan.savings.offload_frozen or offloads


def test_moments_take_what_the_optimizer_makes_of_them() -> None:
    assert {name: sum(dtype.itemsize for dtype in both) for name, both in _MOMENTS.items()} == MOMENT_BYTES


def test_layers_that_come_late_are_waited_for(job: Job) -> None:
    layout, slow = make_layout(2, 1, 1, True, 8), Cluster(host_gbytes=4.0)
    times = [step_time(job, cluster, layout, "none", offloaded=True) for cluster in (Cluster(host_gbytes=400.0), slow)]
    assert times[0].host == 0
    # All but two layers of both models come for each pack, half of each linear, while the frozen models compute.
    linears = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    copies = 2 * 30 * (linears / 2 + 2 * 4096) * 2 / (4e9 * 0.7)
    (cost,) = stage_costs(job, slow, layout, "none")
    assert times[1].host == pytest.approx(job.micro_batches(layout) * (copies - cost.frozen))


def test_memory_bound_work_is_counted_where_memory_is_described(job: Job) -> None:
    layout = make_layout(2, 1, 1, True, 8)
    lumped, apart = (step_time(job, Cluster(memory_gbytes=rate), layout, "none") for rate in (0.0, 3350.0))
    assert (lumped.memory, lumped.optimizer) == (0, 0)
    moved = job.micro_batches(layout) * sum(moved_bytes(job, layout, "none", 0))
    assert apart.memory == pytest.approx(moved / 3350e9)
    # At least what the weights' gradients of all packs are, once in bf16 and read and written in fp32.
    assert moved > job.micro_batches(layout) * 4.0e9 * (2 + 8)
    assert apart.optimizer == pytest.approx(optimizer_bytes(job, layout) / 3350e9)
    assert apart.total == pytest.approx(lumped.total + apart.memory + apart.optimizer)


def test_the_command_line_plans_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path, PUBLISHED["Llama-3-8B"])
    model = ["--model", str(tmp_path), "--write", str(tmp_path / "config.yaml"), "--train", "pairs.jsonl"]
    sizes = ["--tensor", "2", "--pipeline", "2", "--virtual-pipeline", "2", "--context", "2"]
    assert tgdpo_plan([*model, *sizes, "--moments", "bf16", "--offload-frozen"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("8 GPUs = TP2 x PP2 in 2 chunks x CP2 x DP1 + SP, recompute none, optimizer.moments=bf16 ")
    config = load_config(tmp_path / "config.yaml", [])
    parallel = config.parallel
    assert (parallel.context, parallel.virtual_pipeline, parallel.pipeline) == (2, 2, 2)
    assert (config.optimizer.moments, config.offload.frozen) == ("bf16", True)


def test_little_room_is_said(job: Job) -> None:
    layout = make_layout(2, 1, 1, True, 8)
    need = make_plan(job, Cluster(), layout, "none").memory.total / 2**30
    for gib, wanted in ((1.02 * need + 6, "little room is left; with less: "), (2 * need, ""), (need, "with less: ")):
        cluster = Cluster(gpu_memory_gib=gib)
        lines = plan_text(make_plan(job, cluster, layout, "none"), job, cluster).splitlines()
        found = [line for line in lines if "with less" in line]
        assert [line.startswith(f"{wanted}offload.frozen=true (") for line in found] == [True] * bool(wanted)


def test_speed_is_told_as_runs_tell_it(job: Job) -> None:
    def told(text: str) -> dict[str, list[str]]:
        return {line[:26].strip(): line[26:].split() for line in text.splitlines()}

    layout = make_layout(2, 1, 1, True, 8)
    shared = replace(job, batch=replace(BATCH, shared_prompts=True))
    for each, tokens in (job, 2048), (shared, 1536):
        plan = make_plan(each, Cluster(), layout, "none")
        figures, rate = told(plan_text(plan, each, Cluster())), 128 / plan.time.total / 8
        assert float(figures["tokens/s per GPU"][0]) == pytest.approx(tokens * rate, rel=1e-3)
        assert float(figures["pairs/s per GPU"][0]) == pytest.approx(rate, rel=5e-3)
    plan = make_plan(job, Cluster(), layout, "none")
    # Of a pair, two sequences of 1,024 tokens; three passes of the policy, one each of reference and guide.
    layers = 32 * (2048 * 2 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336) + 2 * 1024 * 1025 // 2 * 4 * 4096)
    tflops = 128 * 5 * (layers + 2 * 1024 * 128256 * 4096) / 1e12 / plan.time.total / 8
    found = told(plan_text(plan, job, Cluster()))["model TFLOP/s per GPU"]
    assert float(found[0]) == pytest.approx(tflops, rel=5e-3)
    assert found[2] == f"{tflops / 989:.2f})"


def test_where_nothing_fits_the_smallest_is_shown_and_what_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(write_config(tmp_path, PUBLISHED["Llama-3-70B"]))]
    assert tgdpo_plan([*model, "--top", "40"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "none of 40 layouts of 8 GPUs fits; the smallest:"
    sizes = [float(line.split(" full ")[1].split()[0]) for line in out if line.endswith("does not fit")]
    assert len(sizes) == 40
    assert sizes == sorted(sizes)
    assert out[-1] == "what fits: --lora-rank 16, or --nodes 4"
    assert tgdpo_plan([*model, "--lora-rank", "16", "--top", "1"]) == 0
    assert "what fits" not in capsys.readouterr().out
