"""The layout that the planner takes for a config."""

from collections.abc import Sequence

from transformers import PretrainedConfig

from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.planning.activations import Pack
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Batch, Job
from megatron_tgdpo.planning.layouts import Plan, all_plans
from megatron_tgdpo.planning.memory import GIB


def choose_layout(config: Config, models: Sequence[PretrainedConfig], cluster: Cluster) -> Plan:
    """The fastest layout that fits, by estimate, for pairs of ``data.max_length`` tokens, half of them response.

    Args:
        config: The run; its own layout is not looked at.
        models: HF configs of the policy and of the frozen models that run along.
        cluster: The machines.

    Raises:
        UserError: None fits.
    """
    shared = config.shared_prompts
    batch = Batch(config.batch.global_pairs, config.data.max_length, 0.5, shared)
    keep = config.train.keep_logits_mib * 2**20
    dtype_bytes = 4 if config.precision.dtype == "fp32" else 2
    pack = Pack(config.seq_length, config.longest_sequence, dtype_bytes, batch.gathered_keys, keep)
    plans = all_plans(Job(models[0], tuple(models[1:]), pack, batch), cluster)
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return fitting[0]
    usable = f"{cluster.gpu_memory_gib - cluster.reserve_gib:g} of {cluster.gpu_memory_gib:g} GiB"
    least = min((plan.memory.total for plan in plans), default=None)
    if least is None:
        raise UserError(f"no layout of {cluster.gpus} GPUs divides the model")
    raise UserError(
        f"no layout of {cluster.gpus} GPUs fits: the smallest takes {least / GIB:.0f} GiB a GPU, with {usable} usable; "
        "take more GPUs, or look for another way with tgdpo plan (shorter packs, guidance.mode cached)"
    )
