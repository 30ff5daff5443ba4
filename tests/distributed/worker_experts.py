"""Converts and computes models with experts on the layouts that it is told, and leaves the results for the test.

Usage: ``worker_experts ROOT single`` or ``worker_experts ROOT LAYOUT...`` with ROOT/hf of HF models, and LAYOUT a
tensor, an expert and an expert-tensor size such as ``2-2-1``; what tensor ranks leave are data ranks.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from checkpoints_convert.export import export_hf
from checkpoints_convert.import_hf import import_hf
from checkpoints_convert.logits import packed_outputs
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend
from megatron_tgdpo.distributed.layout import destroy_model_parallel, init_model_parallel, make_layout
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment
from megatron_tgdpo.models.experts import Router
from megatron_tgdpo.models.families import family_of
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.mapping import parameter_count
from megatron_tgdpo.models.language_model import LanguageModel, build_language_model
from megatron_tgdpo.planning.memory import expert_parameters, stage_parameters
from megatron_tgdpo.storage.dtypes import dtype_name
from tests.checkpoints import load_weights, save
from tests.distributed.worker_conversion import LENGTHS, pack_tokens

CPU = torch.device("cpu")


def run_layout(root: Path, name: str) -> None:
    tensor, expert, expert_tensor = map(int, name.split("-"))
    layout = make_layout(tensor, 1, 1, True, dist.get_world_size(), expert=expert, expert_tensor=expert_tensor)
    pg = init_model_parallel(layout, seed=1, timeout_minutes=15)
    for hf in sorted((root / "hf").iterdir()):
        hf_config, out = read_hf_config(hf), root / "out" / name / hf.name
        if expert_tensor > 1 and family_of(hf_config.architectures).config_kwargs(hf_config)["add_bias_linear"]:
            continue
        model = build_language_model(hf_config, layout, pg, dtype=torch.float32, device=CPU)
        load_weights(model, hf, hf_config, pg)
        planned = {"all": stage_parameters(hf_config, layout, 0), "experts": expert_parameters(hf_config, layout, 0)}
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        of_experts = sum(size for name, size in sizes.items() if ".experts." in name)
        assert planned == {"all": sum(sizes.values()), "experts": of_experts}
        routed = record_routes(model)
        outputs = packed_outputs(model, pack_tokens(), LENGTHS, pg)
        assert outputs is not None
        if dist.get_rank() == 0:
            out.mkdir(parents=True)
            routes = {f"experts.{layer}": experts for layer, experts in enumerate(routed)} if tensor == 1 else {}
            save_file({"logits": outputs.logits.contiguous(), **routes}, out / "logits.safetensors")
        # From HF files, and from a checkpoint that no model made, by way of this layout's ranks into HF files again.
        model = build_language_model(hf_config, layout, pg, dtype=hf_config.dtype, device=CPU)
        for source in (hf, root / "megatron" / hf.name):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))
            load_weights(model, source, hf_config, pg)
            saved = out / f"{source.parent.name}-megatron"
            metadata = {"dtype": dtype_name(hf_config.dtype), "parameters": parameter_count(hf_config)}
            save(saved, {"model": model.sharded_state_dict()}, hf, metadata)
            arguments = {"stored": hf_config.dtype, "dtype": hf_config.dtype, "max_shard_bytes": 40_000}
            export_hf(saved, out / source.parent.name, template=saved, **arguments)
    destroy_model_parallel()


def record_routes(model: LanguageModel) -> list[Tensor]:
    """Filled by the next forward: for each layer [S, experts], whether a token goes to an expert."""
    routed: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda *arguments: routed.append(arguments[-1][1].to(torch.uint8)))
    return routed


def run_single(root: Path) -> None:
    """Makes from ROOT/hf: ROOT/megatron without a model, and ROOT/live from a model."""
    layout = make_layout(1, 1, 1, False, 1)
    pg = init_model_parallel(layout, seed=1, timeout_minutes=15)
    for hf in sorted((root / "hf").iterdir()):
        hf_config = read_hf_config(hf)
        import_hf(hf, root / "megatron" / hf.name, hf_config)
        model = build_language_model(hf_config, layout, pg, dtype=hf_config.dtype, device=CPU)
        load_weights(model, hf, hf_config, pg)
        metadata = {"dtype": dtype_name(hf_config.dtype), "parameters": parameter_count(hf_config)}
        save(root / "live" / hf.name, {"model": model.sharded_state_dict()}, hf, metadata)
    destroy_model_parallel()


def main() -> None:
    root = Path(sys.argv[1])
    enable_cpu_backend()
    ranks = read_rank_environment()
    init_distributed(ranks, CPU, 15, connect_store(ranks))
    for name in sys.argv[2:]:
        if name == "single":
            run_single(root)
        else:
            run_layout(root, name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
