"""Loads an HF directory through Megatron-Bridge and leaves the weights it exports again, and its logits.

Usage: ``worker_bridge HF OUT``; one GPU.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.bridge import AutoBridge
from safetensors.torch import save_file

TOKENS = 200


def tokens() -> torch.Tensor:
    """[1, TOKENS] int64 ids below 128."""
    return torch.randint(0, 128, (1, TOKENS), generator=torch.Generator().manual_seed(7))


def main() -> None:
    hf, out = Path(sys.argv[1]), Path(sys.argv[2])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29511")
    bridge = AutoBridge.from_hf_pretrained(hf, torch_dtype=torch.bfloat16)
    provider = bridge.to_megatron_provider(load_weights=True)
    provider.params_dtype = provider.pipeline_dtype = torch.bfloat16
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    models = provider.provide_distributed_model(wrap_with_ddp=False)
    weights = {name: weight.contiguous() for name, weight in bridge.export_hf_weights(models, cpu=True)}
    save_file({name: weight.clone() for name, weight in weights.items()}, out / "weights.safetensors")
    with torch.no_grad():
        ids = tokens().cuda()
        logits = models[0](ids, torch.arange(TOKENS, device="cuda")[None], None)
    save_file({"logits": logits[0].float().cpu().contiguous()}, out / "logits.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
