"""Trains on an emulated Blackwell GPU with its recipes: ``worker_blackwell ROOT``, on one rank.

Leaves ``ROOT/blackwell.json``: losses and gradient norms by recipe, also of a run that continues, and what products
were made of. The environment names the GPU: EMULATED_CAPABILITY=10.0.
"""

from tests.emulation.emulated import install

install()

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch.distributed as dist  # noqa: E402

from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend  # noqa: E402
from megatron_tgdpo.distributed.layout import init_model_parallel, make_layout  # noqa: E402
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment  # noqa: E402
from tests.emulation import kernels  # noqa: E402
from tests.emulation.runs import CPU, Runs  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "mxfp8": {"precision": {"fp8": "mxfp8"}},
    "nvfp4": {"precision": {"fp4": "nvfp4"}},
    "nvfp4, FP8 frozen": {"precision": {"fp4": "nvfp4", "frozen": "fp8"}},
    "nvfp4, streamed": {"precision": {"fp4": "nvfp4"}, "offload": {"frozen": True}},
    "nvfp4, plain ends": {"precision": {"fp4": "nvfp4", "first_last_layers_bf16": True, "frozen": "bf16"}},
}


def main() -> None:
    root = Path(sys.argv[1])
    enable_cpu_backend()
    ranks = read_rank_environment()
    init_distributed(ranks, CPU, 15, connect_store(ranks))
    layout = make_layout(1, 1, 1, False, 1)
    runs = Runs(root, layout, init_model_parallel(layout, seed=1, timeout_minutes=15))
    found = {}
    for name, sections in CASES.items():
        kernels.calls.clear()
        run = runs.resumed(root / name, **sections)
        operands = {operand for call in kernels.calls if call.startswith("gemm ") for operand in call.split()[1:]}
        found[name] = {**run, "operands": sorted(operands)}
    (root / "blackwell.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
