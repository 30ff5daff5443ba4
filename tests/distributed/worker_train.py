"""Runs several training configs one after another in one group of processes, and exports each result to HF.

    torchrun ... -m tests.distributed.worker_train CASES.json

The file holds a list of ``{"config": {...}, "export": DIR or null}``; with ``"precompute": PAIRS`` a guidance cache is
computed, in shards of so many pairs, instead of a training, with ``"verify": PAIRS`` one is checked. With
``"bucket_parameters": COUNT`` gradients are reduced in buckets of so many parameters. With ``"state": "megatron-core"``
checkpoints are saved and loaded as megatron-core's distributed optimizer does it.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer

from checkpoints_convert.export import export_hf
from checkpoints_convert.export_adapter import export_adapter
from megatron_tgdpo.checkpoints.adapter_directory import is_adapter
from megatron_tgdpo.checkpoints.listing import newest_checkpoint
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.distributed.ranks import connect_store, read_rank_environment
from megatron_tgdpo.gpu.overlap import ddp_config
from megatron_tgdpo.guidance.precompute import precompute_guidance, verify_guidance
from megatron_tgdpo.setup import engine
from megatron_tgdpo.storage.dtypes import DTYPES
from megatron_tgdpo.training import checkpoint_saver, engine_state
from megatron_tgdpo.training.run import run
from tools.benchmarks.save import gathered_state


def export(config: Config, out: Path) -> None:
    """Writes the run's newest checkpoint as HF."""
    newest = newest_checkpoint(Path(config.output_dir))
    assert newest is not None
    stored = DTYPES[config.precision.dtype]
    if is_adapter(newest):
        export_adapter(newest, out, dtype=stored)
        return
    export_hf(newest, out, template=newest, stored=stored, dtype=stored, max_shard_bytes=10**9)


@contextmanager
def buckets_of(parameters: int | None) -> Iterator[None]:
    """Sets the size of megatron-core's gradient buckets, which is no option of the project."""
    with mock.patch.object(
        engine, "ddp_config", lambda *sections: replace(ddp_config(*sections), bucket_size=parameters)
    ):
        yield


@contextmanager
def state_of(kind: str | None) -> Iterator[None]:
    """Who makes the state of checkpoints."""
    if kind != "megatron-core":
        yield
        return
    with (
        mock.patch.object(engine_state, "training_state", gathered_state),
        mock.patch.object(checkpoint_saver, "training_state", gathered_state),
        mock.patch.object(engine_state, "load_optimizer_shards", ChainedOptimizer.load_state_dict),
    ):
        yield


def main() -> None:
    warnings.filterwarnings("ignore")
    ranks = read_rank_environment()
    store = connect_store(ranks)
    for number, case in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        config, own_store = config_from_dict(case["config"]), dist.PrefixStore(f"case{number}", store)
        if "precompute" in case:
            precompute_guidance(config, case["precompute"], ranks, own_store)
        elif "verify" in case:
            verify_guidance(config, case["verify"], ranks, own_store)
        else:
            with buckets_of(case.get("bucket_parameters")), state_of(case.get("state")):
                run(config, ranks, own_store)
        if case.get("export"):
            export(config, Path(case["export"]))
        # Every gloo group keeps a thread awake: those of all cases together would slow the later ones down.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
