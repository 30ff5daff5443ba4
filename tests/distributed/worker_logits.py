"""Logits of one HF directory on one rank, with a family file of its own: ``worker_logits HF FAMILY_FILE OUT``."""

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

from checkpoints_convert.logits import packed_outputs
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend
from megatron_tgdpo.distributed.layout import init_model_parallel, make_layout
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.load import load_hf_weights
from megatron_tgdpo.models.language_model import build_language_model

CPU = torch.device("cpu")
LENGTHS = [60, 40]


def pack_tokens() -> torch.Tensor:
    return torch.randint(0, 128, (sum(LENGTHS),), generator=torch.Generator().manual_seed(7))


def main() -> None:
    hf, file, out = (Path(argument) for argument in sys.argv[1:])
    spec = importlib.util.spec_from_file_location("family_of_the_page", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    enable_cpu_backend()
    ranks = read_rank_environment()
    init_distributed(ranks, CPU, 15, connect_store(ranks))
    layout = make_layout(1, 1, 1, False, 1)
    pg = init_model_parallel(layout, seed=1, timeout_minutes=15)
    with mock.patch("checkpoints_convert.families.FAMILIES", (module.FAMILY,)):
        hf_config = read_hf_config(hf)
        model = build_language_model(hf_config, layout, pg, dtype=torch.float32, device=CPU)
        load_hf_weights(model, hf, hf_config, pg)
        outputs = packed_outputs(model, pack_tokens(), LENGTHS, pg)
    assert outputs is not None
    save_file({"logits": outputs.logits.contiguous()}, out)


if __name__ == "__main__":
    main()
