"""Host memory and time of saving and loading a training state, beside megatron-core's own state of the same names.

    python -m tools.benchmarks.save [--size 60m] [--data-ranks 2 4] [--dtype bf16|fp32] [--directory DIR]
    python -m tools.benchmarks.save --layouts 1x1x4 2x1x2 1x2x2 2x2x1 [--size 60m] ...

A random Llama is trained by so many data ranks, a process each, on the CPU. Each rank saves its policy and optimizer
and loads them again; printed is the peak of its resident memory above what it held before, of the fullest and of the
emptiest rank, in bytes a parameter. ``gathered`` is the state of megatron-core 0.16.1's distributed optimizer, type
``fully_reshardable``. With ``--layouts``, tensor x pipeline x data ranks, only the project's own state is saved, and
printed are its files. Files are written and synced in DIR (default: a temporary directory), and removed.
"""

import argparse
import gc
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from megatron_tgdpo.checkpoints import save as save_module
from megatron_tgdpo.checkpoints.load import load_sharded
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend
from megatron_tgdpo.distributed.layout import init_model_parallel, make_layout
from megatron_tgdpo.setup.engine import Engine, build_engine, policy_chunks
from megatron_tgdpo.setup.model_inputs import read_model_configs
from megatron_tgdpo.storage.dtypes import DTYPES
from megatron_tgdpo.training.checkpoint_saver import live_storages
from megatron_tgdpo.training.engine_state import training_state
from megatron_tgdpo.training.sharded_optimizer_state import load_optimizer_shards
from tools.benchmarks.training_step.models import SHAPES, llama_config, write_model
from tools.benchmarks.training_step.recorder import reset_peak, resident_bytes

_VOCABULARY = 32_000


@dataclass(frozen=True)
class Job:
    """What the ranks do: ``owned`` says whose state is saved."""

    policy: str
    dtype: str
    tensor: int
    pipeline: int
    data: int
    owned: bool
    parameters: int
    directory: str

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data


def gathered_state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
    """As :func:`training_state`, with whole tensors on every data rank."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "dp_cp_group": engine.pg.dp_cp,
    }
    model = {str(n): chunk.sharded_state_dict(metadata=metadata) for n, chunk in enumerate(policy_chunks(engine))}
    return {"model": model, "optimizer": engine.optimizer.sharded_state_dict(model, is_loading, metadata=metadata)}


def _engine(job: Job) -> Engine:
    config = config_from_dict(
        {
            "model": {"policy": job.policy},
            "data": {"train": "unused", "max_length": 64},
            "loss": {"method": "simpo"},
            "batch": {"global_pairs": 8},
            "optimizer": {"lr": 1e-3},
            "precision": {"dtype": job.dtype},
            "train": {"steps": 1},
            "output_dir": "unused",
        },
        "benchmark",
    )
    layout = make_layout(job.tensor, job.pipeline, 1, job.tensor > 1, job.ranks)
    engine = build_engine(
        config, read_model_configs(config), layout, init_model_parallel(layout, 0, 60), 1, torch.device("cpu")
    )
    # Pages that nobody has written to are not there yet.
    for state in engine.optimizer.optimizer.state.values():
        for value in state.values():
            value.fill_(0.5)
    for chunk in engine.chunks:
        for buffer in chunk.buffers:
            buffer.grad_data.zero_()
    return engine


def _peak(action: Callable[[], Any]) -> tuple[int, float]:
    """Bytes above what was resident before, and seconds between barriers."""
    gc.collect()
    dist.barrier()
    before, begin = resident_bytes("VmRSS"), time.perf_counter()
    reset_peak()
    action()
    peak = resident_bytes("VmHWM") - before
    dist.barrier()
    return peak, time.perf_counter() - begin


def _measure(rank: int, job: Job) -> None:
    """One data rank."""
    enable_cpu_backend()
    torch.set_num_threads(1)
    directory = Path(job.directory)
    store = dist.FileStore(str(directory / "store"), job.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job.ranks)
    engine, path = _engine(job), directory / "checkpoint"
    state_of = training_state if job.owned else gathered_state

    def save() -> None:
        staged = save_module.stage(state_of(engine, is_loading=False), live_storages(engine))
        save_module.write(path, staged, Path(job.policy), {"dtype": job.dtype, "step": 1})

    def load() -> None:
        state = load_sharded(path, state_of(engine, is_loading=True))["optimizer"]
        if job.owned:
            load_optimizer_shards(engine.optimizer, state)
        else:
            engine.optimizer.load_state_dict(state)

    results: list[Any] = [None] * job.ranks
    dist.all_gather_object(results, [_peak(save), _peak(load)])
    if rank == 0:
        (directory / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def _run(job: Job) -> list[list[tuple[int, float]]]:
    """Bytes and seconds of saving and of loading, for each rank."""
    multiprocessing.spawn(_measure, (job,), nprocs=job.ranks)
    results: list[list[tuple[int, float]]] = json.loads((Path(job.directory) / "results.json").read_text())
    return results


def _memory_line(job: Job) -> str:
    """One line of the table of memory."""
    results, columns = _run(job), []
    for number in range(2):
        peaks = [rank[number][0] / job.parameters for rank in results]
        columns.append(f"{max(peaks):6.2f} {min(peaks):6.2f} {max(rank[number][1] for rank in results):7.2f}")
    return f"{job.ranks:5d} {'owned' if job.owned else 'gathered':<9} {columns[0]}   {columns[1]}"


def _files_line(job: Job) -> str:
    """One line of the table of files; a rank's are named by it."""
    results, directory = _run(job), Path(job.directory) / "checkpoint"
    written = Counter[str]()
    for file in directory.glob("*.distcp"):
        written[file.name.split("_")[2]] += file.stat().st_size
    others = [file for file in directory.iterdir() if file.is_file() and file.suffix != ".distcp"]
    sizes = [written[str(rank)] / 1e6 for rank in range(job.ranks)]
    seconds = [max(rank[number][1] for rank in results) for number in range(2)]
    return (
        f"{f'{job.tensor}x{job.pipeline}x{job.data}':<8} {len(written):6d} {max(sizes):8.1f} {min(sizes):8.1f} "
        f"{len(others):7d} {sum(file.stat().st_size for file in others) / 1e6:8.2f} {seconds[0]:7.2f} {seconds[1]:7.2f}"
    )


def _layout(text: str) -> tuple[int, int, int]:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"'{text}': give tensor x pipeline x data ranks, as 2x1x2")
    tensor, pipeline, data = map(int, sizes)
    return tensor, pipeline, data


def main() -> None:
    """Measures both states and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.save")
    parser.add_argument("--size", choices=[name for name in SHAPES if name != "tiny"], default="60m")
    parser.add_argument("--data-ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layouts", type=_layout, nargs="+", metavar="TxPxD", help="instead of data ranks alone")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--directory", type=Path, help="default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        policy = Path(temporary) / "policy"
        shape = llama_config(SHAPES[arguments.size], _VOCABULARY, tied=False, max_length=64)
        parameters = write_model(policy, shape, dtype=DTYPES[arguments.dtype], seed=0).total
        about = f"{parameters / 1e6:.1f}M parameters in {arguments.dtype}"

        def job(layout: tuple[int, int, int], owned: bool) -> Job:
            directory = Path(temporary) / f"{'x'.join(map(str, layout))}-{owned}"
            directory.mkdir()
            return Job(str(policy), arguments.dtype, *layout, owned, parameters, str(directory))

        if arguments.layouts is not None:
            print(f"{about}; MB, and seconds of the slowest rank")
            print(f"{'':8} {'files of ranks':<24} {'other files':<16}")
            print(f"{'layout':<8} {'number':>6} {'most':>8} {'least':>8} {'number':>7} {'':>8} {'save':>7} {'load':>7}")
            for layout in arguments.layouts:
                measured = job(layout, True)
                print(_files_line(measured), flush=True)
                shutil.rmtree(measured.directory)
            return
        print(f"{about}; bytes a parameter above what was there")
        print(f"{'':15} {'save':<23} load")
        print(f"{'ranks':>5} {'state':<9} {'most':>6} {'least':>6} {'s':>7}   {'most':>6} {'least':>6} {'s':>7}")
        for ranks in arguments.data_ranks:
            for owned in (False, True):
                measured = job((1, 1, ranks), owned)
                print(_memory_line(measured), flush=True)
                shutil.rmtree(measured.directory)


if __name__ == "__main__":
    main()
