"""Converts every family of a directory and computes with it on two ranks, for the test to judge.

Usage: ``worker_families ROOT``, where ROOT/hf holds HF models. Each is converted to Megatron without a model; computes
on tp2 with sequence parallelism, from the HF files, is saved there and exported; computes on pp2, from the conversion.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoints_convert.import_hf import import_hf
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend
from megatron_tgdpo.distributed.layout import destroy_model_parallel, init_model_parallel
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.mapping import parameter_count
from megatron_tgdpo.models.language_model import build_language_model
from tests.checkpoints import load_weights, save
from tests.distributed.worker_conversion import CPU, compute, export, parse_layout

LAYOUTS = ("tp2-pp1-sp", "tp1-pp2")


def run_layout(root: Path, name: str) -> None:
    layout = parse_layout(name, dist.get_world_size())
    pg = init_model_parallel(layout, seed=1, timeout_minutes=15)
    for hf in sorted((root / "hf").iterdir()):
        hf_config, out, imported = read_hf_config(hf), root / "out" / name / hf.name, root / "megatron" / hf.name
        if dist.get_rank() == 0:
            out.mkdir(parents=True)
        dist.barrier()
        if layout.pipeline > 1:
            compute(imported, hf_config, layout, pg, out)
            continue
        import_hf(hf, imported, hf_config)
        compute(hf, hf_config, layout, pg, out)
        model = build_language_model(hf_config, layout, pg, dtype=torch.float32, device=CPU)
        load_weights(model, hf, hf_config, pg)
        metadata = {"dtype": "fp32", "parameters": parameter_count(hf_config)}
        save(out / "saved", {"model": model.sharded_state_dict()}, hf, metadata)
        export(out / "saved", out / "exported", torch.float32)
    destroy_model_parallel()


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    enable_cpu_backend()
    ranks = read_rank_environment()
    init_distributed(ranks, CPU, 15, connect_store(ranks))
    for name in LAYOUTS:
        run_layout(root, name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
