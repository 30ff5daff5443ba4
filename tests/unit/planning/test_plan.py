"""The planner's arithmetic by hand, its ranking and warnings, and that a dry run says the same."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import PretrainedConfig

from megatron_tgdpo.checkpoints.adapter_directory import Lora
from megatron_tgdpo.config.loading import config_from_dict, load_config
from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.preprocess import preprocess, try_first_records
from megatron_tgdpo.data.sources import Source
from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.gpu.fp8 import linear_bytes
from megatron_tgdpo.models.attention import sdpa as attention
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.mapping import parameter_count
from megatron_tgdpo.planning.activations import QUERY_BLOCK, Pack, layer_activations, stage_activations
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Batch, Job
from megatron_tgdpo.planning.layouts import all_plans, choose_layout, make_plan
from megatron_tgdpo.planning.memory import FrozenSource, LinearBytes, Sources, stage_memory, stage_parameters
from megatron_tgdpo.planning.report import memory_lines, plan_text
from megatron_tgdpo.planning.step_time import layer_flops, stage_costs, step_time
from megatron_tgdpo.planning.traffic import traffic
from megatron_tgdpo.setup.model_sources import planned_sources
from megatron_tgdpo.training.run import _instead, dry_run, pack_lines, planned_memory
from tests.distributed.common import write_pairs
from tests.processes import run_forked
from tests.published_configs import PUBLISHED, write_config
from tests.tiny_models import make_llama
from tests.unit.config.test_loading import VALID
from tgdpo.plan import main as tgdpo_plan

ROW = Pack(tokens=4096, sequence_tokens=2048, dtype_bytes=2)
BATCH = Batch(global_pairs=128, pair_tokens=2048, response_share=0.5, shared_prompts=False)
SINGLE = make_layout(1, 1, 1, False, 1)


def published(tmp_path: Path, name: str) -> PretrainedConfig:
    return read_hf_config(write_config(tmp_path, PUBLISHED[name]))


@pytest.fixture
def llama(tmp_path: Path) -> PretrainedConfig:
    return published(tmp_path, "Llama-3-8B")


def test_activations_of_a_layer_by_hand(llama: PretrainedConfig) -> None:
    hidden, mlp, query, key, head = 4096, 14336, 4096, 1024, 128
    norms, linear_inputs = 2 * hidden, 2 * hidden + query + mlp
    rotated, projected, angles = query + key, query + 2 * key, 4 * head
    gate = 2 * mlp  # joint, of which SwiGLU makes the rest again
    elements = norms + linear_inputs + rotated + projected + angles + gate
    sdpa = 2 * query + 4 * 32  # output, and an fp32 log-sum-exp a head
    assert layer_activations(llama, SINGLE, ROW, "selective", 0) == 4096 * 2 * elements
    assert layer_activations(llama, SINGLE, ROW, "none", 0) == 4096 * (2 * elements + sdpa)
    assert layer_activations(llama, SINGLE, ROW, "full", 0) == 4096 * 2 * hidden


def test_tensor_and_sequence_parallelism_divide_activations(llama: PretrainedConfig) -> None:
    whole = layer_activations(llama, SINGLE, ROW, "none", 0)
    angles, outside = 4 * 128 * 2 * 4096, 4 * 4096 * 2 * 4096
    both = layer_activations(llama, make_layout(8, 1, 1, True, 8), ROW, "none", 0)
    tensor_only = layer_activations(llama, make_layout(8, 1, 1, False, 8), ROW, "none", 0)
    assert both == (whole - angles) / 8 + angles
    assert tensor_only == both + outside * 7 / 8


def test_masked_attention_keeps_its_masks(tmp_path: Path) -> None:
    assert QUERY_BLOCK == attention._QUERY_BLOCK
    gemma = published(tmp_path, "gemma-2-2b")
    saved = [
        layer_activations(gemma, SINGLE, ROW, "none", 0) - layer_activations(gemma, SINGLE, ROW, "selective", 0)
        for ROW in (Pack(4096, 1024, 2), Pack(4096, 2048, 2))
    ]
    # One byte for each query and key of a block; the first block of two sees only its own keys.
    assert saved == [4096 * 1024, 4096 * (1024 + 2048) / 2]


def test_stages_hold_as_many_micro_batches_as_follow(llama: PretrainedConfig) -> None:
    layout = make_layout(1, 4, 1, False, 4)
    layer = layer_activations(llama, layout, ROW, "none", 0)
    assert [stage_activations(llama, layout, ROW, "none", stage) / layer for stage in range(3)] == [32, 24, 16]
    assert stage_activations(llama, layout, ROW, "none", 3) == 8 * layer + 2 * 4096 * 4096 * 2


def test_optimizer_state_is_split_over_data_ranks(llama: PretrainedConfig) -> None:
    one, eight = (stage_memory(llama, [llama], make_layout(1, 1, 1, False, n), ROW, "none", 0) for n in (1, 8))
    assert one.optimizer == 12 * parameter_count(llama) == 8 * eight.optimizer
    assert one.static - one.optimizer == eight.static - eight.optimizer == (2 + 4 + 2) * parameter_count(llama)


def test_an_adapter_has_gradients_and_state_and_its_base_neither(llama: PretrainedConfig) -> None:
    lora, grid = Lora(16, 32.0), make_layout(2, 1, 1, True, 2)
    sources = Sources(lora, (FrozenSource(shared=True), FrozenSource(Lora(8, 16.0, ("q_proj", "o_proj")), shared=True)))
    plan = stage_memory(llama, [llama, llama], grid, ROW, "none", 0, sources=sources)
    whole = stage_memory(llama, [], grid, ROW, "none", 0)
    # Of each of 32 layers, on one of two tensor ranks: A and B of q, k, v; o; gate, up; down.
    qkv, o = 3 * 4096 + 6144 // 2, 4096 // 2 + 4096
    trained = 32 * 16 * (qkv + o + 2 * 4096 + 28672 // 2 + 14336 // 2 + 4096)
    assert plan.trained_parameters == trained
    assert (plan.gradients, plan.optimizer, plan.save) == (4 * trained, 12 * trained, (2 + 12) * trained)
    assert plan.weights == whole.weights + 2 * trained
    assert plan.frozen == 2 * 32 * 8 * (qkv + o)
    assert f"(of which {trained:,} train)" in memory_lines(plan)[0]
    assert "train)" not in memory_lines(whole)[0]


def test_activations_beside_an_adapter_by_hand(llama: PretrainedConfig) -> None:
    whole, some = Lora(16, 32.0), Lora(8, 16.0, ("v_proj", "down_proj"))
    size, tokens = 2, ROW.tokens
    # Frozen linears keep no input, adapters keep theirs, what each A made, and each B as one product takes it.
    linear_inputs, made = 4096 + 4096 + 4096 + 14336, (3 + 1 + 2 + 1) * 16
    rows = 3 * (4096 + 2 * 1024) + 4096 + 2 * 2 * 14336 + 4096
    full = layer_activations(llama, SINGLE, ROW, "none", 1)
    assert layer_activations(llama, SINGLE, ROW, "none", 1, whole) == full + size * (tokens * made + 16 * rows)
    kept = layer_activations(llama, SINGLE, ROW, "none", 1, some)
    without = linear_inputs - 4096 - 14336
    made, rows = (3 + 1) * 8, 8 * (3 * (4096 + 2 * 1024) + 4096)
    assert kept == full + size * (tokens * (made - without) + rows)
    # The first norm's input is the embedding, which has no gradient.
    assert layer_activations(llama, SINGLE, ROW, "none", 0, some) == kept - size * tokens * 4096


def test_two_layers_of_a_frozen_model_are_there_where_they_wait_elsewhere(llama: PretrainedConfig) -> None:
    """8B: 32 layers of 218,112,000 parameters, and of a vocabulary of 128,256 embedding, output weight and norm."""
    layout = make_layout(2, 2, 1, True, 4)
    for stage, rest in ((0, 128256 * 4096 // 2), (1, 128256 * 4096 // 2 + 4096)):
        plain, off = (
            stage_memory(llama, [llama], layout, ROW, "full", stage, offloaded=offloaded) for offloaded in (False, True)
        )
        layer = (218_112_000 - 2 * 4096) // 2 + 2 * 4096
        assert plain.frozen == 2 * (16 * layer + rest)
        assert off.frozen == 2 * (2 * layer + rest)
        assert off.weights == plain.weights


def test_weights_of_linears_in_fp8(llama: PretrainedConfig) -> None:
    grid = make_layout(2, 2, 1, True, 4)
    plain, fp8 = (
        stage_memory(llama, [llama, llama], grid, ROW, "none", 0, fp8) for fp8 in (LinearBytes(), LinearBytes(4, 1))
    )
    # Half of 32 layers, of each half: attention's two linears and the MLP's two.
    linears = 8 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    assert fp8.weights - plain.weights == 2 * linears
    assert plain.frozen - fp8.frozen == 2 * linears
    ends = stage_memory(llama, [llama, llama], grid, ROW, "none", 0, LinearBytes(4, 1, plain_ends=True))
    assert plain.frozen - ends.frozen == 2 * linears * 15 // 16
    assert (plain.optimizer, plain.gradients, plain.save) == (fp8.optimizer, fp8.gradients, fp8.save)


@pytest.mark.parametrize(
    ("precision", "offload", "wanted"),
    [
        ({}, False, LinearBytes()),
        ({"fp8": "tensorwise"}, False, LinearBytes(4, 1)),
        ({"fp8": "tensorwise", "fp8_params": True}, False, LinearBytes(2, 1)),
        ({"fp8": "tensorwise"}, True, LinearBytes(4, None)),
        ({"fp8": "delayed", "frozen": "bf16"}, False, LinearBytes(4, None)),
        ({"fp4": "nvfp4"}, False, LinearBytes(3.125, 2.5625)),
        ({"fp4": "nvfp4"}, True, LinearBytes(3.125, None)),
        ({"frozen": "fp8", "first_last_layers_bf16": True}, False, LinearBytes(None, 1, plain_ends=True)),
    ],
)
def test_what_a_precision_makes_of_weights(precision: dict, offload: bool, wanted: LinearBytes) -> None:
    train = {**VALID["train"], "check_start": False}
    sections = {"precision": precision, "offload": {"frozen": offload}, "train": train}
    assert linear_bytes(config_from_dict({**VALID, **sections})) == wanted


def test_what_a_save_holds_is_split_over_data_and_context_ranks(llama: PretrainedConfig) -> None:
    one = stage_memory(llama, [], make_layout(1, 1, 1, False, 1), ROW, "none", 0)
    eight = stage_memory(llama, [], make_layout(1, 1, 2, False, 8), ROW, "none", 0)
    assert one.save == 14 * parameter_count(llama) == 8 * eight.save
    assert one.total == one.static + one.activations + one.carried + one.workspace


def test_flops_are_two_a_weight_and_attention(llama: PretrainedConfig) -> None:
    norms, embeddings = 65 * 4096, 2 * 128256 * 4096
    assert 32 * layer_flops(llama, 0) == 2 * (parameter_count(llama) - norms - embeddings)
    assert layer_flops(llama, 2048) - layer_flops(llama, 0) == 2 * 4096 * 2048


def test_context_ranks_divide_a_packs_work(llama: PretrainedConfig) -> None:
    job = Job(llama, (llama, llama), ROW, BATCH)
    one, four = make_layout(2, 1, 1, True, 8), make_layout(2, 1, 4, True, 8)
    # As many packs as without them for each of the fewer data ranks, a part of each.
    assert job.micro_batches(four) == 4 * job.micro_batches(one)
    ours, theirs = step_time(job, Cluster(), four, "none"), step_time(job, Cluster(), one, "none")
    assert ours.compute == pytest.approx(theirs.compute)
    assert ours.tensor == pytest.approx(theirs.tensor)


def test_traffic_by_hand(llama: PretrainedConfig) -> None:
    job = Job(llama, (llama, llama), ROW, BATCH)
    sent = traffic(job, make_layout(2, 4, 1, True, 16), "none")
    hidden, packs = 4096 * 4096 * 2, 32
    # Eight layers: forward of three models four half passes each, backward of one six.
    assert sent.tensor == packs * 8 * hidden / 2 * (3 * 4 + 6)
    assert sent.pipeline == packs * hidden / 2 * 4
    largest = stage_parameters(llama, make_layout(2, 4, 1, True, 16), 3)  # has the final norm
    assert sent.data == (4 + 2) * largest / 2


def test_traffic_of_adapters_by_hand(llama: PretrainedConfig) -> None:
    sources = Sources(
        Lora(16, 32.0), (FrozenSource(shared=True), FrozenSource(Lora(8, 16.0, ("o_proj",)), shared=True))
    )
    job, whole = Job(llama, (llama, llama), ROW, BATCH, sources=sources), Job(llama, (llama, llama), ROW, BATCH)
    hidden, packs, number = 4096 * 4096 * 2, 32, 4096 * 2 * 16
    for sequence_parallel in (True, False):
        layout = make_layout(2, 4, 1, sequence_parallel, 16)
        # What seven As made goes forwards and backwards, of the guide's one; frozen linears gather no input again.
        added = (2 * 7 + 1 / 2) * number if sequence_parallel else (2 * 7 + 2 / 2) * number
        added -= 2 * hidden if sequence_parallel else 0
        sent = traffic(job, layout, "none")
        assert sent.tensor == traffic(whole, layout, "none").tensor + packs * 8 / 2 * added
        assert sent.data < traffic(whole, layout, "none").data / 50


def test_a_bubble_is_as_long_as_the_other_stages_take(llama: PretrainedConfig) -> None:
    job, layout = Job(llama, (llama,), ROW, BATCH), make_layout(1, 4, 1, False, 8)
    plan = make_plan(job, Cluster(), layout, "none")
    costs = stage_costs(job, Cluster(), layout, "none")
    others = sum(cost.forward + cost.backward + cost.frozen for cost in costs[:-1])
    time = plan.time
    assert time.bubble == pytest.approx(others)
    # The last stage also computes log-probs, so the others are faster.
    assert time.bubble < 3 / 32 * (time.compute + time.pipeline)
    assert plan.bubble == pytest.approx(others / (others + time.compute + time.pipeline))


def test_recomputation_costs_time_and_saves_memory(llama: PretrainedConfig) -> None:
    job, layout = Job(llama, (llama, llama), ROW, BATCH), make_layout(4, 1, 1, True, 8)
    plans = [make_plan(job, Cluster(), layout, recompute) for recompute in ("none", "selective", "full")]
    assert sorted(plans, key=lambda plan: plan.time.total) == plans
    assert sorted(plans, key=lambda plan: -plan.memory.total) == plans


def test_links_between_nodes_are_slower(llama: PretrainedConfig) -> None:
    job, layout = Job(llama, (llama,), ROW, BATCH), make_layout(1, 2, 1, False, 8)
    inside, outside = (step_time(job, Cluster(n, 8 // n), layout, "none") for n in (1, 2))
    assert (outside.compute, inside.pipeline * 9) == (inside.compute, pytest.approx(outside.pipeline))


def test_ranking_covers_the_layouts_that_divide(llama: PretrainedConfig) -> None:
    plans = all_plans(Job(llama, (llama, llama), ROW, BATCH), Cluster(), plain=True)
    assert {(plan.layout.tensor, plan.layout.pipeline) for plan in plans} == {
        (tensor, pipeline) for tensor in (1, 2, 4, 8) for pipeline in (1, 2, 4, 8) if tensor * pipeline <= 8
    }
    assert [plan.fits for plan in plans] == [True] * 9 + [False]
    times = [plan.time.total for plan in plans if plan.fits]
    assert times == sorted(times)


def test_a_thousand_gpus_need_more_pairs(tmp_path: Path) -> None:
    llama = published(tmp_path, "Llama-3-70B")
    few = Job(llama, (llama, llama), ROW, BATCH)
    many = Job(llama, (llama, llama), ROW, Batch(4096, 2048, 0.5, False))
    wide, deep = make_layout(8, 1, 1, True, 1024), make_layout(8, 4, 1, True, 1024)
    cluster = Cluster(nodes=128)
    assert "64 of 128 data ranks have no pair" in make_plan(few, cluster, wide, "full").warning
    assert "(2) do not fill the stages (4)" in make_plan(few, cluster, deep, "none").warning
    assert make_plan(many, cluster, deep, "none").warning == ""
    assert make_plan(many, cluster, deep, "none").fits


def test_a_layout_must_divide(llama: PretrainedConfig) -> None:
    with pytest.raises(UserError, match=r"32 layers are fewer than parallel\.pipeline = 33 stages"):
        make_plan(Job(llama, (), ROW, BATCH), Cluster(), make_layout(1, 33, 1, False, 33), "none")


def test_a_dry_run_says_the_same(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "model")
    values = {
        **VALID,
        "model": {"policy": str(path), "guide": str(make_llama(tmp_path / "guide"))},
        "parallel": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
        "train": {"steps": 1, "recompute": "full"},
    }
    model = read_hf_config(path)
    pack = replace(ROW, gathered_keys=BATCH.gathered_keys, keep_logits_bytes=2**30)
    plan = make_plan(Job(model, (model, model), pack, BATCH), Cluster(), make_layout(2, 2, 1, True, 8), "full")
    config = config_from_dict(values)
    text, fits = dry_run(config, 8)
    assert "\n".join(["", *memory_lines(plan.memory), ""]) in text
    assert fits
    assert text.endswith("\nfits 74.0 GiB (80 less 6 reserved)")
    assert "\n1 steps of 8 pairs, 16,384 tokens" in text
    # What it shows of the config is all that there is to it.
    assert config_from_dict(yaml.safe_load(text[: text.index("ranks: ")])) == config
    assert "amax" not in text
    assert "fp8_amax_history" in dry_run(config, 8, full=True)[0]
    # Eight pairs fill three packs of 4096 tokens.
    (warning,) = [line for line in dry_run(config, 64)[0].splitlines() if "data ranks" in line]
    assert warning.startswith("WARNING: 13 of 16 data ranks have no pair: raise batch.global_pairs to ")
    text, fits = dry_run(config, 8, 6.001)
    assert not fits
    verdict, instead = text.splitlines()[-2:]
    assert verdict == "does NOT fit 0.0 GiB (6.001 less 6 reserved)"
    assert instead.startswith(("the nearest that fits: parallel.tensor=", "no layout of 8 GPUs fits"))


def test_a_dry_run_counts_the_steps_of_its_epochs(tmp_path: Path) -> None:
    path, file = make_llama(tmp_path / "model"), tmp_path / "pairs.jsonl"
    write_pairs(file, 30)
    values = {**VALID, "model": {"policy": str(path), "guide": str(path)}, "train": {"epochs": 1.5}}
    sources = [str(file), {"path": str(file), "weight": 0.5}]
    lines = {
        name: dry_run(config_from_dict({**values, "data": {"train": train}}), 1)[0].splitlines()
        for name, train in {"raw": sources, "missing": str(tmp_path / "no.jsonl")}.items()
    }
    tried = try_first_records([Source(str(file))], PreprocessOptions(str(path), max_length=2048, workers=1))
    tokens = 8 * round((2 * tried.lengths[:, 0] + tried.lengths[:, 1] + tried.lengths[:, 2]).mean())
    assert tried.records == 30
    # 1.5 x (30 + 15) pairs in steps of 8.
    assert lines["raw"][-2].startswith(
        f"1.5 epochs of 60 records, if each is a pair: 9 steps of 8 pairs, {tokens:,} tokens (by the first 60 records)"
        f": {9 * tokens:,} in all, about "
    )
    assert lines["missing"][-3].startswith("1.5 epochs in steps of 8 pairs, 16,384 tokens if sequences are half as")
    assert lines["missing"][-2].startswith(f"WARNING: data.train: {tmp_path}/no.jsonl: cannot be read: No such")
    short = {**values, "data": {"train": str(file), "max_length": int(tried.lengths[:, :2].sum(axis=1).min())}}
    assert "are cut and lose their end token" in dry_run(config_from_dict(short), 1)[0].splitlines()[-2]
    prefix = str(tmp_path / "pairs")
    write_pairs(file, 20)
    preprocess([str(file)], prefix, PreprocessOptions(str(path), max_length=64, workers=1), progress=False)
    line = dry_run(config_from_dict({**values, "data": {"train": prefix}}), 1)[0].splitlines()[-2]
    lengths = PreferenceDataset(prefix).lengths
    tokens = 8 * round((2 * lengths[:, 0] + lengths[:, 1] + lengths[:, 2]).mean())
    assert line.startswith(f"1.5 epochs of 20 pairs: 4 steps of 8 pairs, {tokens:,} tokens: {4 * tokens:,} in all")


def test_a_dry_run_on_a_cpu_speaks_of_this_machine(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "model")
    values = {**VALID, "model": {"policy": str(path)}, "guide": {"method": "dpo"}, "train": {"steps": 1}}
    config = config_from_dict(values)
    text, fits = dry_run(config, 2, on_cpu=True)
    assert fits
    assert "H100" not in text
    # A guide that is still to be trained has weights of its own.
    ((policy, frozen),) = re.findall(r"policy ([\d,]+), frozen ([\d,]+)", text)
    assert int(frozen.replace(",", "")) == 2 * int(policy.replace(",", ""))
    verdict, others = text.splitlines()[-2:]
    assert re.fullmatch(r"fits this machine's [\d.]+ GiB, of which it needs [\d.]+", verdict)
    assert others == "for GPUs, here or elsewhere: tgdpo train CONFIG --dry-run --world-size N --gpu-memory-gib GIB"
    # The method's options are as they are by default.
    assert "alpha" not in text
    assert config_from_dict(yaml.safe_load(text[: text.index("ranks: ")])) == config


def test_a_cpus_memory_is_where_weights_wait(llama: PretrainedConfig) -> None:
    values = {**VALID, "model": {"policy": "policy"}, "loss": {"method": "dpo"}}
    models, layout = {"policy": llama, "reference": llama}, make_layout(1, 1, 1, False, 1)

    def frozen(offload: dict[str, object], *, on_cpu: bool) -> int:
        return planned_memory(config_from_dict({**values, "offload": offload}), models, layout, on_cpu=on_cpu).frozen

    whole, host, disk = frozen({}, on_cpu=True), {"frozen": True}, {"frozen": True, "frozen_from": "disk"}
    assert frozen(host, on_cpu=True) == whole
    assert frozen(disk, on_cpu=True) == frozen(disk, on_cpu=False) == frozen(host, on_cpu=False) < whole / 3


def test_a_dry_run_that_does_not_fit_names_overrides_that_do(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "model")
    values = {**VALID, "model": {"policy": str(path), "guide": str(path)}}
    needed = {tensor: dry_run(config_from_dict({**values, "parallel": {"tensor": tensor}}), 4) for tensor in (1, 2)}
    totals = [float(re.findall(r"total +([\d.]+) GiB", text)[0]) for text, _ in needed.values()]
    assert totals[0] > totals[1]
    text, fits = dry_run(config_from_dict(values), 4, 6 + sum(totals) / 2)
    assert not fits
    instead = re.findall(r"^the nearest that fits: (.*) \(", text, re.M)[0].split()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert dry_run(load_config(tmp_path / "config.yaml", instead), 4, 6 + sum(totals) / 2)[1]
    # Also where the config has what the other layout has not.
    chunks = {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": {"policy": [2, 2]}}
    modules = {"recompute": "selective", "recompute_modules": ["mlp"], "steps": 1}
    longer = make_llama(tmp_path / "longer", layers=4)
    values |= {"parallel": chunks, "train": modules, "model": {"policy": str(longer), "guide": str(longer)}}
    (tmp_path / "chunks.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="with virtual_pipeline, one for each chunk"):
        load_config(tmp_path / "chunks.yaml", ["parallel.pipeline=1"])
    plan = make_plan(*_longer_job(longer), make_layout(4, 1, 1, True, 4), "full")
    line = _instead(plan, load_config(tmp_path / "chunks.yaml", []), 4)
    assert load_config(tmp_path / "chunks.yaml", line.partition(": ")[2].rpartition(" (")[0].split())


def _longer_job(path: Path) -> tuple[Job, Cluster]:
    model = read_hf_config(path)
    return Job(model, (model, model), ROW, BATCH), Cluster(1, 4)


@pytest.mark.parametrize("offload", [{"activations": True}, {"optimizer": 0.5}])
def test_a_dry_run_on_a_cpu_refuses_what_training_there_does(tmp_path: Path, offload: dict[str, object]) -> None:
    path = str(make_llama(tmp_path / "model"))
    values = {**VALID, "model": {"policy": path, "guide": path}, "offload": offload}
    with pytest.raises(UserError, match=r"offload\.(activations|optimizer) moves .* without a GPU"):
        dry_run(config_from_dict(values), 1, on_cpu=True)


def test_packs_that_a_layout_has_rounded_up_are_said() -> None:
    values = {**VALID, "data": {"train": "pairs.jsonl", "max_length": 128}}
    three = {"tensor": 3, "sequence_parallel": True}
    assert pack_lines(config_from_dict(values)) == []
    why = "the default: layout and precision take packs of a multiple of"
    for sections, tokens, multiple in (
        ({"parallel": three}, 258, 3),
        ({"parallel": three, "precision": {"fp8": "tensorwise"}}, 288, 48),
    ):
        assert pack_lines(config_from_dict({**values, **sections})) == [
            f"batch.tokens_per_micro_batch: {tokens}, not 256, {why} {multiple} tokens"
        ]
    with pytest.raises(UserError, match=r"batch\.tokens_per_micro_batch 256 is not divisible"):
        config_from_dict({**values, "parallel": three, "batch": {"global_pairs": 8, "tokens_per_micro_batch": 256}})


def test_packs_of_default_size_follow_the_layout(llama: PretrainedConfig) -> None:
    layout, odd = make_layout(4, 1, 1, True, 8), replace(ROW, tokens=4094)
    plan = make_plan(Job(llama, (), odd, BATCH, pack_given=False), Cluster(), layout, "none")
    assert plan == make_plan(Job(llama, (), ROW, BATCH), Cluster(), layout, "none")
    assert "of 4096 tokens per data rank and step (not 4094, the default" in plan_text(
        plan, Job(llama, (), odd, BATCH, pack_given=False), Cluster()
    )
    with pytest.raises(UserError, match=r"packs of 4094 tokens .* take 4096 \(batch\.tokens_per_micro_batch"):
        make_plan(Job(llama, (), odd, BATCH), Cluster(), layout, "none")


def test_a_layout_that_does_not_fit_is_answered_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path, PUBLISHED["Llama-3-8B"])
    arguments = ["--model", str(tmp_path), "--tensor", "2", "--gpu-memory-gib", "48"]
    assert tgdpo_plan(arguments) == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("the nearest that fits: --tensor ")
    instead = last.removeprefix("the nearest that fits: ").partition(" (")[0]
    assert tgdpo_plan([*arguments, *instead.split()]) == 0
    assert tgdpo_plan([*arguments, "--gpu-memory-gib", "8"]) == 1
    assert "no layout of 8 GPUs fits" in capsys.readouterr().out


def test_a_plan_of_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "guide", "adapter"):
        (tmp_path / name).mkdir()
    write_config(tmp_path / "base", PUBLISHED["Llama-3-8B"])
    lora = ["--model", str(tmp_path / "base"), "--gpus-per-node", "1", "--tensor", "1", "--lora-rank", "16"]

    def frozen_gib(*options: str) -> float:
        assert tgdpo_plan([*lora, *options]) in (0, 1)
        text = capsys.readouterr().out
        assert "train)" in text
        return float(re.findall(r"frozen models +([\d.]+) GiB", text)[0])

    # The reference is the base; the guide an adapter as large as the policy's, another, the base too, or a whole model.
    config = {"peft_type": "LORA", "r": 160, "lora_alpha": 160, "target_modules": "all-linear"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    own = frozen_gib()
    assert frozen_gib("--guide", str(tmp_path / "adapter")) == pytest.approx(10 * own, rel=0.02)
    assert frozen_gib("--guide", str(tmp_path / "base")) == frozen_gib("--method", "dpo") == 0
    write_config(tmp_path / "guide", PUBLISHED["Llama-3-8B"])
    assert frozen_gib("--guide", str(tmp_path / "guide")) == pytest.approx(2 * 8.03e9 / 2**30, rel=0.01)
    assert frozen_gib("--lora-targets", "qkv, proj") < own / 2
    assert tgdpo_plan([*lora, "--lora-targets", "embed"]) == 1
    assert "--lora-targets names embed: there are all-linear, q_proj" in capsys.readouterr().err


def test_what_no_layout_is_possible_for_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(write_config(tmp_path, PUBLISHED["gpt-oss-20b"]))]
    assert tgdpo_plan([*model, "--lora-rank", "4"]) == 1
    assert "experts have biases, and adapters of such are not supported" in capsys.readouterr().err
    (tmp_path / "dense").mkdir()
    model = ["--model", str(write_config(tmp_path / "dense", PUBLISHED["Llama-3-8B"]))]
    assert tgdpo_plan([*model, "--expert-tensor", "2"]) == 1
    assert "no model has experts" in capsys.readouterr().err


def test_a_layout_for_adapters_is_chosen(tmp_path: Path) -> None:
    model = str(make_llama(tmp_path / "model"))
    values = {**VALID, "model": {"policy": model, "guide": model}}
    chosen = [config_from_dict({**values, **section}) for section in ({}, {"lora": {"rank": 4}})]
    hf_config = read_hf_config(Path(model))
    plans = [
        choose_layout(each, [hf_config] * 3, Cluster(1, 1), planned_sources(each, list(each.model_paths)))
        for each in chosen
    ]
    assert [plan.memory.frozen > 0 for plan in plans] == [True, False]
    assert plans[0].memory.optimizer > 2 * plans[1].memory.optimizer


@pytest.mark.parametrize(
    "options",
    [[], ["--method", "dpo"], ["--guide", "{model}", "--guidance", "cached"], ["--lora-rank", "4"]],
)
def test_a_written_config_is_one_that_training_takes(tmp_path: Path, options: list[str]) -> None:
    model, out = str(make_llama(tmp_path / "model")), tmp_path / "config.yaml"
    (tmp_path / "pairs.jsonl").write_text("{}")
    sizes = ["--tensor", "2", "--pipeline", "2", "--global-pairs", "16", "--max-length", "64"]
    arguments = ["--model", model, *sizes, *(option.format(model=model) for option in options)]
    assert tgdpo_plan([*arguments, "--write", str(out), "--train", str(tmp_path / "pairs.jsonl")]) == 0
    config = load_config(out, [f"output_dir={tmp_path}/run"])
    assert (config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence_parallel) == (2, 2, True)
    assert (config.model.policy, config.batch.global_pairs, config.data.max_length) == (model, 16, 64)
    assert config.guidance.mode == ("cached" if "cached" in options else "colocated")
    assert config.guide.method == (None if {"dpo", "cached"}.intersection(options) else "dpo")
    lora = "--lora-rank" in options
    assert (config.lora.rank, config.optimizer.lr) == ((4, 7e-6) if lora else (None, 7e-7))
    text, fits = dry_run(config, 8)
    assert fits
    assert "ranks: 8 = TP2 x PP2 x DP2 + SP" in text


def test_a_config_is_not_written_over_another_nor_without_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "config.yaml"
    assert tgdpo_plan(["--model", str(tmp_path), "--write", str(out)]) == 1
    assert "give its data with --train" in capsys.readouterr().err
    out.write_text("mine")
    assert tgdpo_plan(["--model", str(tmp_path), "--write", str(out), "--train", "x"]) == 1
    assert "is there already" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_options_that_change_nothing_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(write_config(tmp_path, PUBLISHED["Llama-3-8B"])), "--tensor", "8"]
    assert tgdpo_plan([*model, "--method", "dpo", "--guide", str(tmp_path), "--lr", "1e-6"]) == 0
    unused = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not used: ")]
    assert unused == ["not used: --guide (--method dpo has no guide), --lr (without --write)"]
    assert tgdpo_plan([*model, "--guide", str(tmp_path), "--recompute", "full"]) == 0
    assert "not used" not in capsys.readouterr().out
    assert tgdpo_plan([*model, "--method", "sft", "--offload-frozen"]) == 0
    out = capsys.readouterr().out
    assert "not used: --offload-frozen (no frozen model runs with --method sft --guidance colocated)" in out
    assert "offload.frozen" not in out
    assert tgdpo_plan([*model, "--schedules", "--context", "2"]) == 0
    assert "not used: --context (--schedules" in capsys.readouterr().out
    assert tgdpo_plan([*model, "--virtual-pipeline", "2"]) == 1
    assert "--virtual-pipeline is 2 with one stage" in capsys.readouterr().err
    assert tgdpo_plan([*model, "--moments", "bf16", "--dtype", "fp32"]) == 1
    assert "--moments bf16 needs --dtype bf16" in capsys.readouterr().err


def test_command_line(tmp_path: Path) -> None:
    write_config(tmp_path, PUBLISHED["Llama-3-8B"])
    for arguments in ([str(tmp_path)], [str(tmp_path / "config.json"), "--tensor", "4", "--recompute", "full"]):
        done = run_forked("tgdpo.plan", ["--model", *arguments])
        assert "tokens/s per GPU" in done.stdout
    assert done.stdout.startswith("8 GPUs = TP4 x PP1 x DP2 + SP, recompute full\n")
    done = run_forked("tgdpo.plan", ["--model", str(tmp_path), "--schedules"])
    stages_and_rows = [line.split()[:2] for line in done.stdout.splitlines()[2:]]
    assert stages_and_rows == [[str(stages), str(packs)] for stages in (2, 4, 8) for packs in (8, 16, 32, 64)]
    (tmp_path / "other.json").write_text("{}")
    done = run_forked("tgdpo.plan", ["--model", str(tmp_path / "other.json")], check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("other.json: a file: name the directory of the model")
