"""Builds the models of a run and fills them with weights."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PretrainedConfig

from megatron_tgdpo.checkpoints.model_directory import is_megatron_checkpoint
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.console import waiting
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.gpu.layer_offload import serve_from_host
from megatron_tgdpo.gpu.options import building, model_options
from megatron_tgdpo.models.hf_weights.load import load_hf_weights, load_megatron_weights, refuse_non_finite
from megatron_tgdpo.models.language_model import LanguageModel, build_language_model
from megatron_tgdpo.storage.dtypes import DTYPES

# megatron-core's arguments for each value of train.recompute.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def load_model(
    path: str, hf_config: PretrainedConfig, layout: ParallelLayout, pg: ProcessGroupCollection, config: Config,
    device: torch.device, recompute: str = "none", frozen: bool = False,
) -> list[LanguageModel]:  # fmt: skip
    """Builds this rank's chunks of one model and fills them from an HF or Megatron directory. Collective.

    Raises:
        UserError: On every rank: it cannot be loaded, or a weight is not finite.
    """
    overrides, block_spec = model_options(config, hf_config, device, frozen=frozen)
    arguments: dict[str, Any] = {
        "dtype": DTYPES[config.precision.dtype],
        "device": device,
        "transformer_overrides": {
            "finalize_model_grads_func": finalize_model_grads,
            "deallocate_pipeline_outputs": layout.pipeline > 1,
            "batch_p2p_comm": True,
            **RECOMPUTE[recompute],
            **overrides,
        },
        "block_spec": block_spec,
    }
    with building(frozen):
        chunks = [build_language_model(hf_config, layout, pg, chunk=n, **arguments) for n in range(layout.virtual)]
    directory = Path(path)
    with waiting(f"loading {directory}", shown=dist.get_rank() == 0):
        if is_megatron_checkpoint(directory):
            load_megatron_weights(chunks, directory, hf_config, verify=config.checkpoint.verify)
        else:
            raise_on_all_ranks(lambda: [load_hf_weights(chunk, directory, hf_config, pg) for chunk in chunks])
        raise_on_all_ranks(lambda: refuse_non_finite(chunks, directory, hf_config))
    if frozen and config.offload.frozen:
        for chunk in chunks:
            serve_from_host(chunk.requires_grad_(False).decoder.layers, device)
    return chunks


def load_frozen_models(
    config: Config,
    configs: Mapping[str, PretrainedConfig],
    layout: ParallelLayout,
    pg: ProcessGroupCollection,
    device: torch.device,
) -> list[LanguageModel]:
    """This rank's slices of the frozen models that the method uses, the reference first. Collective."""
    whole = replace(layout, virtual=1)
    models = []
    for role in config.method.frozen:
        models += load_model(config.model_paths[role], configs[role], whole, pg, config, device, frozen=True)
    return models
