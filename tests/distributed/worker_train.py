"""Runs several training configs one after another in one group of processes, and exports each result to HF.

    torchrun ... -m tests.distributed.worker_train CASES.json

The file holds a list of ``{"config": {...}, "export": DIR or null}``.
"""

import json
import sys
import warnings
from pathlib import Path

import torch.distributed as dist

from checkpoints_convert.export import export_hf
from checkpoints_convert.load import load_megatron_weights
from megatron_tgdpo.checkpoint_format import newest_checkpoint
from megatron_tgdpo.config import Config, config_from_dict
from megatron_tgdpo.cpu_backend import resolve_device
from megatron_tgdpo.hf_config import read_hf_config
from megatron_tgdpo.models import build_language_model
from megatron_tgdpo.parallel import destroy_model_parallel, init_model_parallel, make_layout
from megatron_tgdpo.ranks import RankEnvironment, connect_store, read_rank_environment
from megatron_tgdpo.run import run
from megatron_tgdpo.setup import DTYPES


def export(config: Config, ranks: RankEnvironment, out: Path) -> None:
    """Loads the run's newest checkpoint in the run's own layout and writes it as HF."""
    parallel = config.parallel
    layout = make_layout(
        parallel.tensor, parallel.pipeline, parallel.context, parallel.sequence_parallel, ranks.world_size
    )
    pg = init_model_parallel(layout, 0, parallel.timeout_minutes)
    checkpoint = newest_checkpoint(Path(config.output_dir))
    assert checkpoint is not None
    hf_config = read_hf_config(checkpoint)
    model = build_language_model(
        hf_config, layout, pg, dtype=DTYPES[config.precision.dtype], device=resolve_device("auto")
    )
    load_megatron_weights(model, checkpoint, hf_config)
    export_hf(model, out, checkpoint, hf_config, pg, None)
    destroy_model_parallel()


def main() -> None:
    warnings.filterwarnings("ignore")
    ranks = read_rank_environment()
    store = connect_store(ranks)
    for number, case in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        config = config_from_dict(case["config"])
        run(config, ranks, dist.PrefixStore(f"case{number}", store))
        if case["export"]:
            export(config, ranks, Path(case["export"]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
