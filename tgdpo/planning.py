"""The work of ``tgdpo plan``: from its parsed arguments to its text."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from transformers import PretrainedConfig

from megatron_tgdpo.config.schema import PrecisionConfig, TrainConfig
from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.loss.methods import METHODS
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.planning.activations import Pack
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Batch, Job
from megatron_tgdpo.planning.layouts import Plan, all_plans, make_plan, nearest
from megatron_tgdpo.planning.memory import GIB
from megatron_tgdpo.planning.report import plan_text, schedules_table, table


def plan(arguments: argparse.Namespace) -> tuple[str, bool]:
    """The text for parsed arguments, and whether what was asked for fits.

    Raises:
        UserError: A config is not supported, or the layout does not divide.
    """
    job = _job(arguments)
    cluster = Cluster(**{field.name: getattr(arguments, field.name) for field in fields(Cluster)})
    sequence_parallel = not arguments.no_sequence_parallel
    if arguments.schedules:
        return schedules_table(job, cluster, arguments.tensor or 1, sequence_parallel, arguments.recompute), True
    if arguments.tensor is not None or arguments.pipeline is not None:
        layout = make_layout(arguments.tensor or 1, arguments.pipeline or 1, 1, sequence_parallel, cluster.gpus)
        asked = make_plan(job, cluster, layout, arguments.recompute)
        text = plan_text(asked, job, cluster)
        return (text, True) if asked.fits else (f"{text}\n{_instead(all_plans(job, cluster), asked)}", False)
    plans = all_plans(job, cluster)
    if not plans:
        raise UserError(f"no layout of {cluster.gpus} GPUs divides the model: change --nodes or --gpus-per-node")
    fitting = sum(plan.fits for plan in plans)
    headline = f"{fitting} of {len(plans)} layouts of {cluster.gpus} GPUs fit; the fastest, by estimate:"
    return "\n".join([headline, table(plans[: arguments.top]), "", plan_text(plans[0], job, cluster)]), fitting > 0


def _instead(plans: Sequence[Plan], asked: Plan) -> str:
    """What fits, as options, where a layout does not."""
    found = nearest(plans, asked.layout)
    if found is None:
        return f"no layout of {asked.layout.world_size} GPUs fits: take more, or other models or packs"
    layout = found.layout
    return (
        f"the nearest that fits: --tensor {layout.tensor} --pipeline {layout.pipeline} --recompute {found.recompute} "
        f"({found.memory.total / GIB:.1f} GiB)"
    )


def _job(arguments: argparse.Namespace) -> Job:
    policy = _read(arguments.model)
    roles = METHODS[arguments.method].frozen if arguments.guidance == "colocated" else ()
    paths = [getattr(arguments, role) for role in roles]
    frozen = tuple(_read(path) if path else policy for path in paths)
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
    return Job(policy, frozen, pack, batch, arguments.seq_length is not None)


def _read(path: str) -> PretrainedConfig:
    file = Path(path)
    if file.is_file() and file.name != "config.json":
        raise UserError(f"{path}: give an HF directory, or the config.json of one")
    return read_hf_config(file.parent if file.is_file() else file)
