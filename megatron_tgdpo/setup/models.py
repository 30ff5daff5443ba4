"""Builds the models of a run and fills them with weights."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PretrainedConfig

from megatron_tgdpo.checkpoints.adapter_directory import Lora, read_lora
from megatron_tgdpo.checkpoints.integrity import refuse_damage
from megatron_tgdpo.checkpoints.load import load_sharded
from megatron_tgdpo.checkpoints.model_directory import is_megatron_checkpoint, is_peft_adapter
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.console import waiting
from megatron_tgdpo.distributed.layout import ROLES, ParallelLayout
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.frozen.models import FrozenModel
from megatron_tgdpo.gpu.activation_offload import ActivationOffload
from megatron_tgdpo.gpu.layer_offload import serve_from_disk, serve_from_host
from megatron_tgdpo.gpu.options import building, model_options
from megatron_tgdpo.models.fp8_tensors import forget_high_precision
from megatron_tgdpo.models.hf_weights.adapter_layout import new_adapter, read_adapter
from megatron_tgdpo.models.hf_weights.adapters import fill_adapter
from megatron_tgdpo.models.hf_weights.load import load_hf_weights, load_megatron_weights, refuse_non_finite
from megatron_tgdpo.models.language_model import LanguageModel, build_language_model
from megatron_tgdpo.models.lora import adapter_state, add_adapter, freeze_all_but, load_adapter_state, set_active
from megatron_tgdpo.planning.recomputation import recompute_kwargs
from megatron_tgdpo.setup.model_sources import model_sources, trained_lora
from megatron_tgdpo.storage.dtypes import DTYPES

# The name of the adapter that trains; frozen ones are called by their role.
POLICY = "policy"


def load_model(
    path: str | Path, hf_config: PretrainedConfig, layout: ParallelLayout, pg: ProcessGroupCollection, config: Config,
    device: torch.device, recompute: str = "none", frozen: bool = False, adapters: bool = False,
) -> list[LanguageModel]:  # fmt: skip
    """Builds this rank's chunks of one model and fills them from an HF or Megatron directory. Collective.

    With ``adapters`` there is room for LoRA adapters: see :func:`load_adapter`.

    Raises:
        UserError: On every rank: it cannot be loaded, or a weight is not finite.
    """
    overrides, block_spec = model_options(config, hf_config, device, frozen=frozen)
    moe = config.moe
    arguments: dict[str, Any] = {
        "dtype": DTYPES[config.precision.dtype],
        "device": device,
        "transformer_overrides": {
            "finalize_model_grads_func": finalize_model_grads,
            "deallocate_pipeline_outputs": layout.pipeline > 1,
            "batch_p2p_comm": True,
            "adapters": adapters,
            **({} if frozen else {"router_aux_loss": moe.aux_loss_coeff, "router_z_loss": moe.z_loss_coeff}),
            **recompute_kwargs(recompute),
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
    return chunks


def offload(model: LanguageModel, config: Config, device: torch.device, directory: Path) -> Callable[[], None] | None:
    """Moves the weights of a frozen model to where section ``offload`` has them wait for its passes.

    Args:
        model: This rank's slice, or a chunk of it.
        config: The run.
        device: Where it runs.
        directory: Of the file, where they wait on disk.

    Returns:
        What is to be called after each pass; None for nothing.

    Raises:
        UserError: On every rank: they cannot be written to disk.
    """
    layers = model.requires_grad_(False).decoder.layers
    if config.offload.frozen_from == "disk":
        return raise_on_all_ranks(lambda: serve_from_disk(model, layers, device, directory))
    serve_from_host(layers, device)
    return None


def load_policy(
    config: Config,
    configs: Mapping[str, PretrainedConfig],
    layout: ParallelLayout,
    pg: ProcessGroupCollection,
    device: torch.device,
) -> list[LanguageModel]:
    """This rank's chunks of the policy, with the adapter that trains, if one does, on. Collective."""
    lora, source, hf_config = trained_lora(config), model_sources(config)["policy"], configs["policy"]
    chunks = load_model(
        source.base, hf_config, layout, pg, config, device, config.train.recomputation, adapters=lora is not None
    )
    if lora is not None:
        for chunk in chunks:
            add_adapter(chunk, POLICY, lora, hf_config)
        if source.adapter is not None:
            load_adapter(chunks, POLICY, source.adapter, lora, hf_config, verify=config.checkpoint.verify)
        else:
            fresh = dict(new_adapter(lora, hf_config, config.train.seed))
            for chunk in chunks:
                fill_adapter(chunk, POLICY, fresh, hf_config)
        for chunk in chunks:
            freeze_all_but(chunk, POLICY)
            forget_high_precision(chunk.parameters())
            set_active(chunk, POLICY)
    if config.offload.activations:
        for chunk in chunks:
            ActivationOffload(chunk.decoder, device)
    return chunks


def load_adapter(
    chunks: Sequence[LanguageModel], name: str, path: Path, lora: Lora, hf_config: PretrainedConfig, *, verify: bool
) -> None:
    """Fills the adapter of this name in this rank's chunks from a directory. Collective.

    Raises:
        UserError: On every rank: it cannot be loaded, or is of another base model.
    """
    if is_peft_adapter(path):
        tensors = raise_on_all_ranks(lambda: read_adapter(path, lora, hf_config))
        for chunk in chunks:
            fill_adapter(chunk, name, tensors, hf_config)
        return
    if verify:
        refuse_damage(path)
    wanted = {str(number): adapter_state(chunk, name) for number, chunk in enumerate(chunks)}
    loaded = load_sharded(path, {"model": wanted})["model"]
    for number, chunk in enumerate(chunks):
        load_adapter_state(chunk, name, loaded[str(number)])


def load_frozen_models(
    config: Config,
    configs: Mapping[str, PretrainedConfig],
    layout: ParallelLayout,
    pg: ProcessGroupCollection,
    device: torch.device,
    policy: Sequence[LanguageModel] = (),
    directory: Path | None = None,
) -> list[list[FrozenModel]]:
    """This rank's chunks of the frozen models that the method uses. Collective.

    Models of one base share its weights, and the policy's where only an adapter of it trains.

    Args:
        config: The run.
        configs: HF configs by role.
        layout: The parallel layout.
        pg: Its process groups.
        device: Of the models.
        policy: Its chunks with room for adapters, where their base may be the policy's.
        directory: Where weights wait that ``offload.frozen_from`` has on disk; None for ``output_dir``.

    Returns:
        For each chunk of the stage (one without the interleaved schedule) the models, the reference first.
    """
    sources, roles = model_sources(config), config.method.frozen
    bases = {sources["policy"].base: list(policy)} if policy else {}
    # What gives the pages of a base back, whichever model on it read them.
    releases: dict[Path, list[Callable[[], None] | None]] = dict.fromkeys(bases, [None] * len(policy))
    found = []
    for role in roles:
        source, shared = sources[role], sources[role].base in bases
        if not shared:
            adapters = any(sources[other].adapter for other in roles if sources[other].base == source.base)
            own = layout.of_model(ROLES.index(role))
            bases[source.base] = load_model(
                source.base, configs[role], own, pg, config, device, frozen=True, adapters=adapters
            )
        chunks = bases[source.base]
        if not shared:
            file = directory or Path(config.output_dir)
            releases[source.base] = [
                offload(chunk, config, device, file) if config.offload.frozen else None for chunk in chunks
            ]
        if source.adapter is not None:
            lora = read_lora(source.adapter)
            for chunk in chunks:
                add_adapter(chunk, role, lora, configs[role])
            load_adapter(chunks, role, source.adapter, lora, configs[role], verify=config.checkpoint.verify)
            for chunk in chunks:
                if chunk in policy:
                    freeze_all_but(chunk, POLICY)
        adapter = None if source.adapter is None else role
        found.append(
            [
                FrozenModel(chunk, adapter, shared, release)
                for chunk, release in zip(chunks, releases[source.base], strict=True)
            ]
        )
    return [list(models) for models in zip(*found, strict=True)]
