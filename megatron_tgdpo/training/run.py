"""One run from config to final checkpoint, and its dry run."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from megatron_tgdpo.batching.sampler import make_sampler
from megatron_tgdpo.config.loading import changed_yaml, to_yaml
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend, resolve_device
from megatron_tgdpo.distributed.layout import ParallelLayout, destroy_model_parallel, init_model_parallel
from megatron_tgdpo.distributed.ranks import RankEnvironment, init_distributed, run_on_all_ranks
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.gpu.capabilities import NEWEST_TESTED_TE, dotted, untested_engine
from megatron_tgdpo.gpu.energy import check_energy
from megatron_tgdpo.gpu.fp8 import linear_bytes
from megatron_tgdpo.gpu.optimizer_state import state_bytes
from megatron_tgdpo.gpu.options import capabilities, check_experts, check_gpu_options, describe_model
from megatron_tgdpo.gpu.overlap import check_offload_without_gpu
from megatron_tgdpo.planning.activations import Pack, gathered_keys, host_activations
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Job
from megatron_tgdpo.planning.layouts import Plan, all_plans, job_of, layout_warning, nearest
from megatron_tgdpo.planning.memory import GIB, RankMemory, Sources, rank_memory
from megatron_tgdpo.planning.recomputation import check_recompute
from megatron_tgdpo.planning.report import memory_lines
from megatron_tgdpo.planning.step_time import step_time
from megatron_tgdpo.resilience.open_files import allow_open_files, files_needed
from megatron_tgdpo.resilience.preflight import preflight
from megatron_tgdpo.resilience.run_lock import RunLock
from megatron_tgdpo.setup.datasets import count_training_data
from megatron_tgdpo.setup.engine import Engine, build_engine, unwrapped
from megatron_tgdpo.setup.hub_inputs import pin_here, pin_inputs
from megatron_tgdpo.setup.layout import fitted_layout, layout_of
from megatron_tgdpo.setup.learning_rate import describe_schedule
from megatron_tgdpo.setup.model_inputs import models_that_run, read_model_configs
from megatron_tgdpo.setup.model_sources import planned_sources, trained_lora
from megatron_tgdpo.setup.trained_guide import is_trained
from megatron_tgdpo.training.best import check_best_metric
from megatron_tgdpo.training.export import Exporter
from megatron_tgdpo.training.finish import finish
from megatron_tgdpo.training.performance import Performance
from megatron_tgdpo.training.resume import begin, find_start, last_step, log_nothing_to_do
from megatron_tgdpo.training.run_data import RunData, check_inputs, open_data, prepare
from megatron_tgdpo.training.trainer import Trainer


def run(
    config: Config,
    ranks: RankEnvironment,
    store: dist.Store,
    exporter: Exporter | None = None,
    guide_of: Sequence[str] | None = None,
) -> None:
    """One training run, from start or newest checkpoint to its last step. Every rank calls.

    Args:
        config: The run.
        ranks: This process's place.
        store: Joins all ranks; unused by an earlier run.
        exporter: Writes HF directories; needed if ``export.hf`` asks for them.
        guide_of: Of the training of a guide: what the user gave ``tgdpo`` for the TGDPO run, the config first.

    Raises:
        UserError: On every rank with the same message, for bad input.
    """
    device = resolve_device(config.parallel.device)
    if device.type == "cpu":
        enable_cpu_backend()
    parallel = config.parallel
    layout = layout_of(config.parallel, ranks.world_size)
    config, pins = pin_inputs(config, ranks, dist.PrefixStore("hub", store))
    model_configs = read_model_configs(config)
    used = models_that_run(config, model_configs)
    layout = fitted_layout(config, used, layout)
    check_gpu_options(config, used, layout, capabilities(device))
    check_best_metric(config)
    if config.log.energy:
        run_on_all_ranks(lambda: check_energy(config, device), dist.PrefixStore("energy", store), ranks)
    needed = files_needed(layout, device)
    run_on_all_ranks(lambda: allow_open_files(needed), dist.PrefixStore("open_files", store), ranks)
    lock = RunLock(Path(config.output_dir))
    with ExitStack() as stack:
        stack.callback(lock.release)
        prepared = prepare(config, lock, pins, ranks, store)
        inputs = check_inputs(config, prepared, ranks, dist.PrefixStore("inputs", store))
        init_distributed(ranks, device, parallel.timeout_minutes, store)
        pg = init_model_parallel(layout, config.train.seed, parallel.timeout_minutes)
        stack.callback(destroy_model_parallel)
        if config.preflight.enabled:
            preflight(config, model_configs["policy"], ranks, layout, pg, device)
        start = find_start(config, inputs)
        data = open_data(config, prepared, model_configs, (start.step, start.pairs))
        begin(config, start, data.order)
        if start.step >= last_step(config, data.order):
            # Before models are built: they may take minutes to load.
            log_nothing_to_do(config, start, data.order)
            finish(config, exporter, start.step, data.order.steps, guide_of)
            return
        engine = build_engine(config, model_configs, layout, pg, data.order.steps, device)
        log_setup(config, engine, layout, data)
        performance = Performance(config, used, engine.pack_format, layout.world_size, device)
        Trainer(config, layout, engine, data, start, performance, exporter, guide_of).train()


def dry_run(
    config: Config,
    world_size: int,
    gpu_memory_gib: float | None = None,
    *,
    full: bool = False,
    on_cpu: bool = False,
) -> tuple[str, bool]:
    """What a run would be, without loading anything.

    Args:
        config: The run.
        world_size: Ranks, each a GPU.
        gpu_memory_gib: Of a GPU; None for the planner's.
        full: Whether the config is shown whole, and not only where it differs from the defaults.
        on_cpu: Whether the ranks are to run on this machine's CPU instead, and share its memory.

    Returns:
        Config, layout, parameters and memory per rank, steps, tokens and hours, and at the end whether it fits or what
        does; and whether it fits.
    """
    layout = layout_of(config.parallel, world_size)
    gpu_memory_gib = Cluster.gpu_memory_gib if gpu_memory_gib is None else gpu_memory_gib
    given, config = config, pin_here(config, weights=False)
    configs = models_that_run(config, read_model_configs(config))
    check_experts(config, configs)
    local = on_cpu or config.model.layer_spec == "local"
    check_recompute(config.train.recomputation, configs["policy"], "local" if local else "transformer_engine")
    if on_cpu:
        check_offload_without_gpu(config)
    layout = fitted_layout(config, configs, layout)
    check_best_metric(config)
    memory = planned_memory(config, configs, layout, on_cpu=on_cpu)
    sources = planned_sources(config, configs)
    # A guide that is still to be trained was given the shape of the policy.
    shown = config if is_trained(given) else replace(config, model=replace(config.model, guide=given.model.guide))
    node = math.gcd(world_size, Cluster.gpus_per_node)
    cluster = Cluster(world_size // node, node, gpu_memory_gib)
    usable = gpu_memory_gib - cluster.reserve_gib
    what = f"{usable:.1f} GiB ({gpu_memory_gib:g} less {cluster.reserve_gib:g} reserved)"
    ranks, fits = f"{world_size} = {layout}", memory.total <= usable * GIB
    if on_cpu:
        usable = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        what = f"this machine's {usable:.1f} GiB, of which it needs {world_size * memory.total / GIB:.1f}"
        ranks, fits = f"{ranks} on this machine's CPU", world_size * memory.total <= usable * GIB
    job = job_of(config, [*configs.values()], sources)
    lines = [
        to_yaml(shown) if full else f"# what differs from the defaults\n{changed_yaml(shown, options=False)}",
        f"ranks: {ranks}",
        *([f"stages: {layout.describe_layers()}"] if layout.layers else []),
        *memory_lines(memory),
        *_host_lines(config, configs["policy"], layout, planned_pack(config, layout), sources),
        *pack_lines(config),
        *_duration(config, job, None if on_cpu else cluster, layout),
        f"{'fits' if fits else 'does NOT fit'} {what}",
    ]
    if on_cpu:
        lines.append("for GPUs, here or elsewhere: tgdpo train CONFIG --dry-run --world-size N --gpu-memory-gib GIB")
    elif not fits:
        plans = [plan for plan in all_plans(job, cluster) if plan.layout.virtual == 1 or not config.guidance.prefetch]
        lines.append(_instead(nearest(plans, layout), config, world_size))
    return "\n".join(line.rstrip() for line in lines), fits


def planned_memory(
    config: Config, configs: Mapping[str, PretrainedConfig], layout: ParallelLayout, *, on_cpu: bool = False
) -> RankMemory:
    """What the fullest rank will hold, on paper.

    Args:
        config: The run.
        configs: Of the models that run, by role.
        layout: The parallel layout.
        on_cpu: Whether it runs on a CPU, whose memory is where ``offload.frozen_from: host`` has weights wait.
    """
    offloaded = config.offload.frozen and not (on_cpu and config.offload.frozen_from == "host")
    frozen = [hf_config for role, hf_config in configs.items() if role != "policy"]
    return rank_memory(
        configs["policy"],
        frozen,
        layout,
        planned_pack(config, layout),
        config.train.recomputation,
        linear_bytes(config),
        planned_sources(config, configs),
        state_bytes(config),
        offloaded,
    )


def planned_pack(config: Config, layout: ParallelLayout) -> Pack:
    """A pack of the run as plans of its memory see it."""
    # How many keys are gathered for shared prompts depends on the data: no more than if a pack were nothing else.
    gathered = gathered_keys(layout.context, 1.0 if config.shared_prompts else 0.0)
    keep = config.train.keep_logits_mib * 2**20
    return Pack(
        config.seq_length // layout.context,
        config.longest_sequence,
        config.precision.parameter_bytes,
        gathered,
        keep,
        config.offload.activations,
    )


def _host_lines(
    config: Config, policy: PretrainedConfig, layout: ParallelLayout, pack: Pack, sources: Sources
) -> list[str]:
    """A line if activations wait on the host; else none."""
    if not config.offload.activations:
        return []
    size = host_activations(policy, layout, pack, config.train.recomputation, sources.trained)
    return [
        f"offload.activations: {size / GIB:.1f} GiB of pinned host memory on the fullest rank, up to twice that where "
        "PyTorch rounds blocks up"
    ]


def pack_lines(config: Config) -> list[str]:
    """A line if packs have not the tokens that they have by default, though no key says so; else none."""
    default = 2 * config.data.max_length
    if config.batch.tokens_per_micro_batch is not None or config.seq_length == default:
        return []
    return [
        f"batch.tokens_per_micro_batch: {config.seq_length}, not {default}, the default: layout and "
        f"precision take packs of a multiple of {config.seq_length_multiple} tokens"
    ]


def _duration(config: Config, job: Job, cluster: Cluster | None, layout: ParallelLayout) -> list[str]:
    """Steps, tokens and, on a cluster, hours; by the planner's assumptions (docs/planning.md) where the data does not
    say. Then what there is to warn of."""
    train, batch, steps = config.train, job.batch, config.train.steps
    whole, by, warnings = "", " if sequences are half as long as they may be", []
    try:
        data = count_training_data(config, whole=steps is None)
    except UserError as error:
        warnings = [f"WARNING: data.train: {error}"]
    else:
        batch = replace(batch, pair_tokens=round(data.pair_tokens), response_share=data.response_share)
        by = "" if data.tried is None else f" (by the first {data.tried} records)"
        warnings = [] if data.warning is None else [f"WARNING: {data.warning}"]
        if steps is None:
            size, shuffle, number = batch.global_pairs, config.data.shuffle, sum(part.pairs for part in data.parts)
            steps = make_sampler(data.parts, size, None, train.epochs, shuffle, train.seed).steps
            what = "pairs" if data.tried is None else "records, if each is a pair"
            whole = f"{train.epochs:g} epochs of {number:,} {what}: "
    tokens = batch.global_pairs * batch.pair_tokens
    each = f"{batch.global_pairs} pairs, {tokens:,} tokens{by}"
    seconds = None
    if cluster is not None:
        job, offloaded = replace(job, batch=batch), config.offload.frozen
        seconds = step_time(job, cluster, layout, train.recomputation, offloaded=offloaded).total
        odd = layout_warning(job, cluster, layout)
        warnings += [f"WARNING: {odd}"] if odd else []
    if steps is None:
        time = "" if seconds is None else f"; about {seconds:.2g} s a step on H100 GPUs"
        return [f"{train.epochs:g} epochs in steps of {each}{time}", *warnings]
    time = "" if seconds is None else f", about {steps * seconds / 3600:.2g} hours on H100 GPUs"
    return [f"{whole}{steps:,} steps of {each}: {steps * tokens:,} in all{time}", *warnings]


def _instead(plan: Plan | None, config: Config, world_size: int) -> str:
    if plan is None:
        return f"no layout of {world_size} GPUs fits: take more, or shorter packs, or guidance.mode=cached"
    keys = {"context": 1, **plan.layout.keys}
    keys.pop("pipeline_layers", None)  # as they are by default
    words = [f"parallel.{key}={str(value).lower()}" for key, value in keys.items()]
    # What the config says and this layout has not would be refused beside it.
    words += [
        f"parallel.{key}=null"
        for key in ("virtual_pipeline", "expert_tensor")
        if key not in keys and getattr(config.parallel, key) is not None
    ]
    words += ["parallel.expert=1"] if "expert" not in keys and config.parallel.expert > 1 else []
    words += [
        f"parallel.pipeline_layers.{role}=null"
        for role, layers in asdict(config.parallel.pipeline_layers).items()
        if layers is not None
    ]
    words += [f"train.recompute={plan.recompute}"]
    words += ["train.recompute_modules=null"] if config.train.recompute_modules is not None else []
    words += [str(plan.savings)] if plan.savings.keys else []
    return f"the nearest that fits: {' '.join(words)} ({plan.memory.total / GIB:.1f} GiB)"


logger = logging.getLogger(__name__)


def log_setup(config: Config, engine: Engine, layout: ParallelLayout, data: RunData) -> None:
    """Logs, on the first rank, the layout, what this machine offers, what of it is in use, and the size of the job."""
    if dist.get_rank() != 0:
        return
    modules = [unwrapped(chunk) for chunk in engine.chunks]
    frozen = [module.frozen for module in modules] if engine.prefetcher is None else [engine.prefetcher.models]
    parts: list[list[torch.nn.Module]] = [[module.policy for module in modules], [*frozen]]
    counts = [sum(p.numel() for module in part for p in module.parameters()) for part in parts]
    found = capabilities(engine.device)
    fused = "" if engine.device.type == "cpu" else f"; fused parts: {config.train.fused}"
    logger.info("layout %s on %s%s", layout, found.describe(), fused)
    if layout.layers:
        logger.info("stages: %s", layout.describe_layers())
    if untested_engine(found.transformer_engine):
        newest = dotted(NEWEST_TESTED_TE)
        logger.warning("Transformer Engine %s is newer than any tested (%s)", dotted(found.transformer_engine), newest)
    described = partial(describe_model, config.model, config.precision)
    logger.info("policy: %s", described(modules[0].policy.config, engine.device))
    for role, each in zip(config.method.frozen, frozen[0].frozen, strict=False):  # none with a cache
        with_adapter = "" if each.adapter is None else f" with the {each.adapter}'s adapter"
        whose = f"the weights above{with_adapter}, " if each.shared else ""
        logger.info("%s: %s%s", role, whose, described(each.model.config, engine.device))
    logger.info("parameters on rank 0: policy %.1fM, frozen %.1fM", counts[0] / 1e6, counts[1] / 1e6)
    if (lora := trained_lora(config)) is not None:
        trained = sum(p.numel() for module in modules for p in module.policy.parameters() if p.requires_grad)
        targets = ", ".join(lora.targets)
        logger.info("LoRA of rank %d, alpha %g on %s: %.2fM train", lora.rank, lora.alpha, targets, trained / 1e6)
    for line in pack_lines(config):
        logger.info("%s", line)
    steps, schedule = data.order.steps, describe_schedule(config.optimizer, data.order.steps)
    logger.info("%d pairs, %d steps of %d pairs, %s", len(data.train), steps, data.order.global_pairs, schedule)
