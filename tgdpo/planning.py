"""The work of ``tgdpo plan``: from its parsed arguments to its text."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from transformers import PretrainedConfig

from megatron_tgdpo.checkpoints.adapter_directory import Lora, is_adapter, read_lora
from megatron_tgdpo.config.loading import changed_yaml, config_from_dict
from megatron_tgdpo.config.schema import PrecisionConfig, TrainConfig
from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.loss.methods import METHODS
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.planning.activations import Pack
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Batch, Job
from megatron_tgdpo.planning.layouts import Plan, all_plans, any_fits, make_plan, nearest
from megatron_tgdpo.planning.memory import GIB, Savings, Sources
from megatron_tgdpo.planning.recomputation import check_recompute, recompute_keys
from megatron_tgdpo.planning.report import plan_text, schedules_table, table
from megatron_tgdpo.setup.model_sources import lora_targets
from megatron_tgdpo.storage.atomic_file import write_atomically

# Which say what the layout is; without any all are ranked.
LAYOUT_OPTIONS = ("tensor", "pipeline", "context", "virtual_pipeline", "expert", "expert_tensor")


def plan(arguments: argparse.Namespace) -> tuple[str, Plan | None]:
    """The text for parsed arguments, and the layout that was asked for or is the best; None for schedules.

    Raises:
        UserError: A config is not supported, or the layout does not divide.
    """
    job = _job(arguments)
    cluster = Cluster(**{field.name: getattr(arguments, field.name) for field in fields(Cluster)})
    sequence_parallel = not arguments.no_sequence_parallel
    check_recompute(arguments.recompute, job.policy, "transformer_engine")
    if arguments.schedules:
        return schedules_table(job, cluster, arguments.tensor or 1, sequence_parallel, arguments.recompute), None
    if any(getattr(arguments, name) is not None for name in LAYOUT_OPTIONS):
        layout = make_layout(
            arguments.tensor or 1,
            arguments.pipeline or 1,
            arguments.context or 1,
            sequence_parallel,
            cluster.gpus,
            arguments.virtual_pipeline or 1,
            expert=arguments.expert or 1,
            expert_tensor=arguments.expert_tensor,
        )
        if layout.virtual > 1 and layout.pipeline == 1:
            raise UserError(f"--virtual-pipeline is {layout.virtual} with one stage: give --pipeline, or leave it out")
        if arguments.moments != "fp32" and arguments.dtype == "fp32":
            raise UserError(f"--moments {arguments.moments} needs --dtype bf16: training refuses it with fp32")
        savings = Savings(arguments.moments, arguments.offload_frozen and bool(job.frozen))
        asked = make_plan(job, cluster, layout, arguments.recompute, savings=savings)
        text = plan_text(asked, job, cluster)
        return (text if asked.fits else f"{text}\n{_instead(all_plans(job, cluster), asked)}"), asked
    plans = all_plans(job, cluster)
    if not plans:
        # What no layout is possible for is refused by its own name.
        make_plan(job, cluster, make_layout(1, 1, 1, False, cluster.gpus), "none")
        raise UserError(f"no layout of {cluster.gpus} GPUs divides the model: change --nodes or --gpus-per-node")
    fitting = sum(plan.fits for plan in plans)
    headline = f"{fitting} of {len(plans)} layouts of {cluster.gpus} GPUs fit; the fastest, by estimate:"
    if not fitting:
        headline = f"none of {len(plans)} layouts of {cluster.gpus} GPUs fits; the smallest:"
    lines = [headline, table(plans[: arguments.top]), "", plan_text(plans[0], job, cluster)]
    return "\n".join(lines if fitting else [*lines, _ways_out(arguments, cluster)]), plans[0]


def _ways_out(arguments: argparse.Namespace, cluster: Cluster) -> str:
    """What to change where no layout fits: the options with which one does, each tried on its own, and the nodes."""
    changes: list[tuple[str, dict[str, object]]] = []
    if arguments.guidance == "colocated" and METHODS[arguments.method].frozen:
        changes.append(("--guidance cached", {"guidance": "cached"}))
    if arguments.lora_rank is None:
        changes.append(("--lora-rank 16", {"lora_rank": 16}))
    ways = [
        option
        for option, change in changes
        if any_fits(_job(argparse.Namespace(**{**vars(arguments), **change})), cluster)
    ]
    job = _job(arguments)
    for nodes in (cluster.nodes * factor for factor in (2, 4, 8, 16, 32)):
        if any_fits(job, replace(cluster, nodes=nodes)):
            ways.append(f"--nodes {nodes}")
            break
    return f"what fits: {', or '.join(ways)}" if ways else "nothing near fits: take other models or shorter packs"


def write_config(arguments: argparse.Namespace, plan: Plan, named: Mapping[str, str | None]) -> None:
    """Writes the config of a planned training.

    Args:
        arguments: The command line.
        plan: Its layout.
        named: The models as the command line has them.

    Raises:
        UserError: The layout does not fit, training would not take the config, or it cannot be written.
    """
    if not plan.fits:
        raise UserError(f"--write {arguments.write}: not written, as the layout does not fit")
    # Training takes a model's directory for what is its config.json here.
    models = {role: path and str(Path(path).parent if _is_file(path) else path) for role, path in named.items()}
    layout, method, lora = plan.layout, METHODS[arguments.method], _lora(arguments)
    values = {
        "model": {
            "policy": models["model"],
            "reference": models["reference"] if "reference" in method.frozen else None,
            "guide": models["guide"] if "guide" in method.frozen else None,
        },
        "data": {"train": arguments.train, "max_length": arguments.max_length},
        "loss": {"method": arguments.method},
        # Without one the guide is trained first.
        "guide": {"method": "dpo" if "guide" in method.frozen and not models["guide"] else None},
        "guidance": {"mode": arguments.guidance, "cache": "guidance" if arguments.guidance == "cached" else None},
        "parallel": layout.keys,
        "batch": {
            "global_pairs": arguments.global_pairs,
            "tokens_per_micro_batch": arguments.seq_length,
            "shared_prompts": False if arguments.no_shared_prompts else None,
        },
        "lora": {} if lora is None else {"rank": lora.rank, "targets": list(lora.targets)},
        "optimizer": {
            "lr": arguments.lr or (7e-7 if lora is None else 7e-6),
            **plan.savings.keys.get("optimizer", {}),
        },
        "offload": plan.savings.keys.get("offload", {}),
        "precision": {"dtype": arguments.dtype},
        "train": {"epochs": 1, **recompute_keys(plan.recompute)},
        "output_dir": str(Path("runs") / arguments.write.stem),
    }
    config = config_from_dict(values, f"--write {arguments.write}")
    # Where the guide is trained follows from output_dir, which may be overridden.
    if config.guide.method is not None:
        config = replace(config, model=replace(config.model, guide=None))
    write_atomically(arguments.write, f"# {layout} on {layout.world_size} GPUs\n{changed_yaml(config)}")


def _is_file(path: str) -> bool:
    return Path(path).is_file()


def _instead(plans: Sequence[Plan], asked: Plan) -> str:
    """What fits, as options, where a layout does not."""
    found = nearest(plans, asked.layout)
    if found is None:
        return f"no layout of {asked.layout.world_size} GPUs fits: take more, or other models or packs"
    keys = {key: value for key, value in found.layout.keys.items() if key in LAYOUT_OPTIONS}
    options = [f"--{key.replace('_', '-')} {value}" for key, value in keys.items()]
    options.append(f"--recompute {found.recompute}")
    if found.savings.moments != "fp32":
        options.append(f"--moments {found.savings.moments}")
    if found.savings.offload_frozen:
        options.append("--offload-frozen")
    return f"the nearest that fits: {' '.join(options)} ({found.memory.total / GIB:.1f} GiB)"


def _job(arguments: argparse.Namespace) -> Job:
    policy = _read(arguments.model)
    frozen, sources = _frozen(arguments, policy)
    share = arguments.response_share
    shared = not (arguments.no_shared_prompts or METHODS[arguments.method].chosen_only)
    batch = Batch(arguments.global_pairs, arguments.pair_tokens or arguments.max_length, share, shared)
    keep = TrainConfig().keep_logits_mib * 2**20
    dtype_bytes = PrecisionConfig(dtype=arguments.dtype).parameter_bytes
    tokens = arguments.seq_length or 2 * arguments.max_length
    if tokens < batch.packed_pair_tokens:
        raise UserError(
            f"--pack-tokens is {tokens} but a pair takes {batch.packed_pair_tokens:.0f} tokens of a pack on average: "
            "raise it, or lower --pair-tokens"
        )
    pack = Pack(tokens, min(arguments.max_length, tokens), dtype_bytes, batch.gathered_keys, keep)
    return Job(policy, frozen, pack, batch, arguments.seq_length is not None, sources)


def _lora(arguments: argparse.Namespace) -> Lora | None:
    """What the policy trains; None for all weights."""
    if arguments.lora_rank is None:
        return None
    targets = lora_targets([name.strip() for name in arguments.lora_targets.split(",")], "--lora-targets")
    return Lora(arguments.lora_rank, 2.0 * arguments.lora_rank, targets)


def _frozen(arguments: argparse.Namespace, policy: PretrainedConfig) -> tuple[tuple[PretrainedConfig, ...], Sources]:
    """Configs of the frozen models, and what models are made of."""
    trained = _lora(arguments)
    configs, sources = [], []
    for role in METHODS[arguments.method].frozen if arguments.guidance == "colocated" else ():
        path, adapter = getattr(arguments, role), None
        if path is not None and is_adapter(Path(path)):
            path, adapter = arguments.model, read_lora(Path(path))
        elif path is None and trained is not None:
            path, adapter = arguments.model, trained if role == "guide" else None
        # Without an adapter each is a model of its own, unless the same is named twice.
        base = str(arguments.model if path is None and role == "reference" else path or role)
        configs.append(_read(path) if path else policy)
        sources.append((base, adapter))
    return tuple(configs), Sources.of(str(arguments.model), trained, sources)


def _read(path: str) -> PretrainedConfig:
    file = Path(path)
    if file.is_file() and file.name != "config.json":
        raise UserError(f"{path}: give an HF directory, or the config.json of one")
    return read_hf_config(file.parent if file.is_file() else file)
