"""``python -m megatron_tgdpo.train CONFIG.yaml section.key=value ...``, one process per rank, under torchrun or srun."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from megatron_tgdpo.config import Config, load_config, to_yaml
from megatron_tgdpo.cpu_backend import enable_cpu_backend, resolve_device
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.memory import GIB, rank_memory
from megatron_tgdpo.optimizer import adam_source
from megatron_tgdpo.parallel import (
    RankEnvironment,
    connect_store,
    destroy_model_parallel,
    init_distributed,
    init_model_parallel,
    make_layout,
    on_first_rank,
    read_rank_environment,
)
from megatron_tgdpo.setup import build_engine, log_setup, open_data, prepare_first_rank, read_model_configs
from megatron_tgdpo.trainer import Trainer


def run(config: Config, ranks: RankEnvironment, store: dist.Store) -> None:
    """One training run, from start or newest checkpoint to its last step. Every rank calls.

    Args:
        config: The run.
        ranks: This process's place.
        store: Joins all ranks; unused by an earlier run.

    Raises:
        UserError: On every rank with the same message, for bad input.
    """
    device = resolve_device(config.parallel.device)
    if device.type == "cpu":
        enable_cpu_backend()
    parallel = config.parallel
    layout = make_layout(
        parallel.tensor, parallel.pipeline, parallel.context, parallel.sequence_parallel, ranks.world_size
    )
    prefixes = on_first_rank(lambda: prepare_first_rank(config), store, ranks.rank)
    init_distributed(ranks, device, parallel.timeout_minutes, store)
    pg = init_model_parallel(layout, config.train.seed, parallel.timeout_minutes)
    try:
        data = open_data(config, prefixes)
        engine = build_engine(config, layout, pg, data.order.steps, device)
        log_setup(engine, layout, adam_source(), data)
        Trainer(config, layout, engine, data).train()
    finally:
        destroy_model_parallel()


def dry_run(config: Config, world_size: int) -> str:
    """The resolved config, the rank grid, and parameters and memory per rank, without loading anything."""
    parallel = config.parallel
    layout = make_layout(parallel.tensor, parallel.pipeline, parallel.context, parallel.sequence_parallel, world_size)
    configs = read_model_configs(config)
    frozen = [hf_config for role, hf_config in configs.items() if role != "policy"]
    for hf_config in configs.values():
        check_divides(hf_config, layout)
    dtype_bytes = 4 if config.precision.dtype == "fp32" else 2
    memory = rank_memory(configs["policy"], frozen, layout, config.row_tokens, dtype_bytes)
    parts = {
        "policy weights": memory.weights,
        "gradients (fp32)": memory.gradients,
        "optimizer (fp32)": memory.optimizer,
        f"frozen {' + '.join(role for role in configs if role != 'policy')}": memory.frozen,
        "hidden states in flight": memory.carried,
        "total without activations inside layers": memory.total,
    }
    lines = [to_yaml(config).rstrip(), f"ranks: {world_size} = {layout}"]
    lines.append(
        f"parameters on the fullest rank: policy {memory.policy_parameters:,}, frozen {memory.frozen_parameters:,}"
    )
    lines += [f"  {name}: {size / GIB:.3f} GiB" for name, size in parts.items()]
    return "\n".join(lines)


@record
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module. Exits with 1 and one line on bad input."""
    parser = argparse.ArgumentParser(prog="python -m megatron_tgdpo.train", description=__doc__)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="print config, rank grid and memory per rank, then stop")
    parser.add_argument("--world-size", type=int, help="ranks to assume in a dry run; default: as launched")
    args = parser.parse_args(arguments)
    rank = 0
    try:
        ranks = read_rank_environment()
        rank = ranks.rank
        logging.basicConfig(
            level=logging.INFO if rank == 0 else logging.ERROR, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
        )
        logging.getLogger("megatron").setLevel(logging.WARNING)
        config = load_config(args.config, args.overrides)
        if args.dry_run:
            if rank == 0:
                print(dry_run(config, args.world_size or ranks.world_size))
            return
        run(config, ranks, connect_store(ranks))
        dist.destroy_process_group()
    except UserError as error:
        # Bad input is the same news on every rank.
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave()
    except Exception:
        lines = traceback.format_exc().splitlines()
        print("\n".join(f"[rank {rank}] {line}" for line in lines), file=sys.stderr, flush=True)
        _leave()


def _leave() -> None:
    """Ends at once: destructors of process groups may wait for ranks that will never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
