"""Looks at everything that a run needs, and says at once all that would stop it; trains nothing.

    tgdpo doctor CONFIG.yaml [--nproc N] [section.key=value ...]        this machine, and what is between its GPUs
    sbatch [--nodes=N] launch/train.sbatch --doctor CONFIG.yaml         an allocation

Models, tokenizers, the first records of every data file, the layout, precision and kernels that the config asks for,
the memory that a rank needs; GPUs, versions, network and storage of all nodes. What the config names of the Hub is
fetched, as training would. Exit status 1 if something would stop the run.
"""

import argparse
import functools
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tgdpo import signals
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.resilience.entry import run_and_exit, run_distributed
from megatron_tgdpo.resilience.launch import nproc_argument

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from transformers import PretrainedConfig

    from megatron_tgdpo.config.schema import Config, GuideConfig
    from megatron_tgdpo.distributed.layout import ParallelLayout
    from megatron_tgdpo.distributed.ranks import RankEnvironment

# A line of the report: ``ok``, ``note`` or ``STOP``, and what it says.
Line = tuple[str, str]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exit status 0 if nothing was found that stops the run, else 1."""
    parser = argparse.ArgumentParser(
        prog="tgdpo doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    nproc_argument(parser)
    args = parser.parse_intermixed_args(arguments)
    run_and_exit(lambda _: _main(args), args.nproc)


def _main(args: argparse.Namespace) -> int:
    signals.listen()
    # Only now: a wrong option should not take the seconds of an import.
    from megatron_tgdpo.config.loading import load_config

    config = load_config(args.config, args.overrides)
    nproc = [] if args.nproc is None else ["--nproc", str(args.nproc)]
    from megatron_tgdpo.setup.trained_guide import is_trained

    name = "train" if is_trained(config) else "pipeline"
    command = shlex.join(["tgdpo", name, args.config, *nproc, *args.overrides])

    def look(ranks: "RankEnvironment", store: "dist.Store") -> int:
        stops = 0
        for kind, text in examine(config, ranks, store):
            stops += kind == "STOP"
            if ranks.rank == 0:
                print(f"{kind:<5} {text}", flush=True)
        if ranks.rank == 0:
            print(f"{stops} problem{'s' * (stops > 1)}: nothing was trained" if stops else f"ready: {command}")
        return 1 if stops else 0

    return run_distributed(config.parallel.timeout_minutes, look)


def examine(config: "Config", ranks: "RankEnvironment", store: "dist.Store") -> Iterator[Line]:
    """What there is to say, a line at a time; the same on every rank, all of which iterate to the end.

    Leaves the ranks joined, for :func:`~megatron_tgdpo.resilience.entry.run_distributed`.

    Raises:
        UserError: On every rank: there is no device of the kind that is asked for, or the ranks cannot be joined.
    """
    import torch.distributed as dist

    from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend, resolve_device
    from megatron_tgdpo.distributed.ranks import init_distributed, run_on_rank0
    from megatron_tgdpo.gpu.options import capabilities
    from megatron_tgdpo.output.directory import is_done
    from megatron_tgdpo.setup.hub_inputs import pin_inputs
    from megatron_tgdpo.setup.trained_guide import is_trained

    device = resolve_device(config.parallel.device)
    if device.type == "cpu":
        enable_cpu_backend()
    count = ranks.world_size
    yield "ok", f"{count} rank{'s' * (count > 1)}: {capabilities(device).describe()}"
    yield "ok", f"versions: {_versions()}"
    guide = config.guide
    if not is_trained(config):
        yield (
            "note",
            f"the guide {config.guide_dir} is not trained yet: tgdpo pipeline does it; looked at as the policy",
        )
        model = replace(config.model, guide=config.model.policy)
        config = replace(config, model=model, guide=replace(config.guide, method=None))
    try:
        config, _ = pin_inputs(config, ranks, dist.PrefixStore("hub", store))
    except UserError as error:
        yield "STOP", str(error)
        pinned = None
    else:
        pinned = config
        inputs = dist.PrefixStore("inputs", store)
        if is_done(config):
            yield "note", f"the run in {config.output_dir} is finished: there is nothing left to train"
        yield from map(
            _line, run_on_rank0(lambda: _input_lines(config, guide, ranks.world_size, device), inputs, ranks.rank)
        )
    init_distributed(ranks, device, config.parallel.timeout_minutes, store)
    if pinned is not None:
        yield from _machine_lines(pinned, ranks, device)


def _line(pair: Sequence[str]) -> Line:
    kind, text = pair
    return kind, text


def _versions() -> str:
    from megatron_tgdpo.resilience.preflight_facts import package_versions

    return ", ".join(f"{name} {version}" for name, version in package_versions().items())


def _input_lines(config: "Config", guide: "GuideConfig", world_size: int, device: "torch.device") -> list[Line]:
    """What one rank can see for all: models, data, and whether the run fits them and a machine like this."""
    from megatron_tgdpo.gpu.energy import check_energy
    from megatron_tgdpo.gpu.options import capabilities, check_gpu_options
    from megatron_tgdpo.output.metrics_log import check_loggers
    from megatron_tgdpo.setup.layout import fitted_layout, layout_of
    from megatron_tgdpo.setup.model_inputs import check_tokenizers, models_that_run, read_model_configs
    from megatron_tgdpo.training.best import check_best_metric
    from megatron_tgdpo.training.run import planned_memory

    lines: list[Line] = []

    def look(action: Callable[[], str]) -> bool:
        try:
            lines.append(("ok", action()))
        except UserError as error:
            lines.append(("STOP", str(error)))
        return lines[-1][0] == "ok"

    @functools.cache
    def configs() -> dict[str, "PretrainedConfig"]:
        return models_that_run(config, read_model_configs(config))

    @functools.cache
    def fitted() -> "ParallelLayout":
        return fitted_layout(config, configs(), layout_of(config.parallel, world_size))

    def models() -> str:
        configs()
        check_tokenizers(config)
        return "models: " + ", ".join(f"{role} {path}" for role, path in config.model_paths.items())

    def layout() -> str:
        found = fitted()
        return f"layout: {found}{f', {found.describe_layers()}' if found.layers else ''}"

    def kernels() -> str:
        check_gpu_options(config, configs(), fitted(), capabilities(device))
        precision = config.precision
        return f"precision: {precision.dtype}, FP8 {precision.fp8}, FP4 {precision.fp4}"

    def memory() -> str:
        asked = replace(config, guide=guide)  # a guide that is still to be trained takes memory of its own
        need = planned_memory(asked, configs(), fitted()).total
        have = _memory_of(device)
        text = f"memory: the fullest rank needs about {need / 2**30:.1f} GiB, by plan"
        if have is None:
            return text
        if need > have:
            raise UserError(
                f"{text}, the GPU has {have / 2**30:.1f}: see tgdpo plan for layouts that fit, or set train.recompute"
            )
        return f"{text}, of {have / 2**30:.1f}"

    def output() -> str:
        check_best_metric(config)
        check_loggers(config)
        check_energy(config, device)
        return "logging and checkpoints: as configured"

    if look(models):
        for name in config.datasets:
            look(lambda name=name: _data(config, name, lines))  # type: ignore[misc]
        if look(layout):
            look(kernels)
            look(memory)
    look(output)
    return lines


def _data(config: "Config", name: str, lines: list[Line]) -> str:
    """A dataset: what was prepared is opened; of raw files the first records are tokenised.

    Adds a note to ``lines`` where many of them are cut.
    """
    from megatron_tgdpo.data.dataset import PreferenceDataset, prepared_prefix
    from megatron_tgdpo.data.preprocess import try_first_records
    from megatron_tgdpo.data.summary import lost_ends_warning
    from megatron_tgdpo.setup.datasets import preprocess_options

    key, sources = f"data.{name.replace('/', '.')}", config.datasets[name]
    prefixes = [prefix for prefix in (prepared_prefix(source.path) for source in sources) if prefix]
    pairs = sum(len(PreferenceDataset(prefix)) for prefix in prefixes)
    tried = try_first_records([s for s in sources if not prepared_prefix(s.path)], preprocess_options(config))
    responses = int((tried.lengths[:, 1:] > 0).sum())
    if warning := lost_ends_warning(key, tried.truncated, responses, config.data.max_length):
        lines.append(("note", warning))
    read = [f"the first {tried.records} records can be read"] * bool(tried.records)
    seen = [f"{pairs:,} pairs are prepared"] * bool(prefixes) + read
    return f"{key}: {', '.join(seen)}"


def _memory_of(device: "torch.device") -> int | None:
    import torch

    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _machine_lines(config: "Config", ranks: "RankEnvironment", device: "torch.device") -> Iterator[Line]:
    """What all ranks see together; every one calls."""
    from megatron_tgdpo.distributed.layout import destroy_model_parallel, init_model_parallel
    from megatron_tgdpo.models.hf_config import read_hf_config
    from megatron_tgdpo.resilience.preflight import examine as examine_machines
    from megatron_tgdpo.setup.layout import layout_of

    try:
        layout = layout_of(config.parallel, ranks.world_size)
        policy = read_hf_config(Path(config.model_paths["policy"]))
    except UserError:
        return  # said above
    pg = init_model_parallel(layout, config.train.seed, config.parallel.timeout_minutes)
    directory = Path(config.output_dir)
    made = _make(directory) if ranks.rank == 0 else []
    try:
        found = examine_machines(config, policy, ranks, layout, pg, device)
    except UserError as error:
        yield "STOP", str(error)
    else:
        yield from (("ok", f"network: {line}") for line in found.bandwidth)
        yield from (("note", note) for note in found.notes)
        yield from (("STOP", str(problem)) for problem in found.problems)
        if not found.problems:
            yield "ok", f"all ranks have the same versions, config and models, and see {directory} alike"
    finally:
        destroy_model_parallel()
        for each in reversed(made):
            with suppress(OSError):
                each.rmdir()


def _make(directory: Path) -> list[Path]:
    """Makes a directory for the time of the examination, which tells where that cannot be done; what was made."""
    missing = [each for each in (*reversed(directory.absolute().parents), directory.absolute()) if not each.exists()]
    made = []
    with suppress(OSError):
        for each in missing:
            each.mkdir()
            made.append(each)
    return made


if __name__ == "__main__":
    main()
