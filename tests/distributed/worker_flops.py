"""Counts the operations of one training step of each given config, on one process. Prints a JSON line for the test.

python -m tests.distributed.worker_flops CONFIGS.json
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from megatron_tgdpo.batching.collate import collate
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend
from megatron_tgdpo.distributed.layout import destroy_model_parallel, init_model_parallel, make_layout
from megatron_tgdpo.distributed.ranks import RankEnvironment, init_distributed
from megatron_tgdpo.guidance.precompute import precompute_guidance
from megatron_tgdpo.resilience.run_lock import RunLock
from megatron_tgdpo.setup.engine import build_engine
from megatron_tgdpo.setup.model_inputs import models_that_run, read_model_configs
from megatron_tgdpo.training.performance import Performance
from megatron_tgdpo.training.run_data import open_data, prepare
from megatron_tgdpo.training.step import train_step

PAIRS = (5, 3, 8)


def _added_product(total: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Of ``total += left @ right``, by their shapes."""
    del total
    result: int = 2 * left[0] * left[1] * right[1]
    return result


def count(values: dict[str, Any]) -> dict[str, float]:
    """By operator, and what the run would report."""
    config, ranks, device = config_from_dict(values), RankEnvironment(0, 1, 0, None, None), torch.device("cpu")
    if config.guidance.mode == "cached":
        precompute_guidance(config, 8, ranks, dist.HashStore())
        dist.destroy_process_group()
    store = dist.HashStore()
    prepared = prepare(config, RunLock(Path(config.output_dir)), {}, ranks, store)
    init_distributed(ranks, device, 5, store)
    layout = make_layout(1, 1, 1, False, 1)
    pg = init_model_parallel(layout, 0, 5)
    configs = read_model_configs(config)
    engine = build_engine(config, configs, layout, pg, 10, device)
    data = open_data(config, prepared, configs)
    guidance, pack_format = data.train_guidance, engine.pack_format
    pack = collate([data.train[index] for index in PAIRS], pack_format, guidance)
    # Not in torch's table: the same product, added in place.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _added_product}) as counter:
        train_step(engine, [pack])
    performance = Performance(config, models_that_run(config, configs), pack_format, 1, device)
    pairs, lengths = list(PAIRS), data.train.lengths
    work = performance.work(lengths[pairs], data.train.trained_lengths[pairs], [0])
    destroy_model_parallel()
    dist.destroy_process_group()
    counted = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    return {
        "counted": counted,
        "reported": work.flops,
        "lengths": lengths[pairs].tolist(),
        "computed": pack.tokens.shape[1],
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    enable_cpu_backend()
    cases = json.loads(Path(sys.argv[1]).read_text())
    print("FACTS " + json.dumps({name: count(values) for name, values in cases.items()}), flush=True)


if __name__ == "__main__":
    main()
