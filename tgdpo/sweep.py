"""Trains every combination of some alphas and betas, one after another, and prints a table.

    tgdpo sweep CONFIG.yaml --alpha 0 0.5 1 --beta 0.1 0.2 --out DIR [--nproc N] [section.key=value ...]

With ``guidance.mode: cached`` all runs read one cache, which depends on neither. Each run writes to
``DIR/alphaA-betaB``; one that is done is not made again, one that was interrupted continues. The first that fails ends
the sweep. Ctrl-C, TERM or USR1 has the one that runs save, and ends the sweep. ``DIR/results.json`` has the table's
metrics.
"""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_tgdpo import console
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.output.metrics_file import logged_steps
from tgdpo.child_processes import Commands
from tgdpo.command_line import check_ranks, positive
from tgdpo.generation.tables import align

COLUMNS = (
    "train/loss", "rewards/margins", "eval/loss", "eval/rewards/accuracies", "eval/rewards/margins",
    "guidance/negative_fraction",
)  # fmt: skip


def combinations(alphas: Sequence[float], betas: Sequence[float], out: Path) -> dict[str, list[str]]:
    """Overrides of each run, by the run's name."""
    return {
        (name := f"alpha{alpha:g}-beta{beta:g}"): [
            f"loss.alpha={alpha!r}", f"loss.beta={beta!r}", f"output_dir={out / name}",
        ]
        for alpha, beta in itertools.product(alphas, betas)
    }  # fmt: skip


def last_metrics(output_dir: Path) -> dict[str, float]:
    """What the last step of a finished run logged."""
    *_, last = logged_steps(output_dir)
    return last


def format_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """One line a run, columns aligned; a metric that was not logged is a dash."""
    names = [name for name in COLUMNS if any(name in metrics for metrics in results.values())]
    rows = [["run", *names]]
    for run, metrics in results.items():
        rows.append([run, *(f"{metrics[name]:.4f}" if name in metrics else "-" for name in names)])
    return align(rows)


def _command(config_file: str, overrides: list[str], ranks: int) -> list[str]:
    nproc = ["--nproc", str(ranks)] if ranks > 1 else []
    return [sys.executable, "-m", "tgdpo", "train", *nproc, config_file, *overrides]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module. Exit status: 0, that of the run that failed, or 75 where it was asked to stop."""
    parser = argparse.ArgumentParser(
        prog="tgdpo sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file of one of the trainings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all runs")
    parser.add_argument("--alpha", type=float, nargs="+", required=True, help="values of loss.alpha")
    parser.add_argument("--beta", type=float, nargs="+", required=True, help="values of loss.beta")
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument(
        "--nproc", type=positive, default=1, metavar="N", help="ranks on this machine; default %(default)s"
    )
    parser.add_argument("--ranks", type=positive, dest="nproc", help=argparse.SUPPRESS)  # its name in 0.1
    args = parser.parse_intermixed_args(arguments)
    console.configure()
    try:
        results = _sweep(args)
        print(format_table(results))
        runs = " ".join(shlex.quote(str(args.out / name)) for name in results)
        print(f"{args.out / 'results.json'}: written; to draw them: tgdpo plot {runs} --out sweep.png")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _sweep(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Makes the runs that are missing; the last metrics of each."""
    # Only now: these imports take seconds, a wrong option should not.
    from megatron_tgdpo.config.loading import load_config
    from megatron_tgdpo.output.directory import is_done
    from megatron_tgdpo.setup.hub_inputs import as_recorded
    from megatron_tgdpo.storage.atomic_file import write_atomically

    runs = combinations(args.alpha, args.beta, args.out.resolve())
    # All of them before the first is trained: a value out of range should not wait for its turn.
    configs = {name: load_config(args.config, [*args.overrides, *own]) for name, own in runs.items()}
    check_ranks(next(iter(configs.values())).parallel, args.nproc)
    shared = next(iter(configs.values())).guide
    if shared.method is not None and shared.output_dir is None:
        raise UserError(f"{args.config}: guide.output_dir is not set: name the directory of the one guide of all runs")
    results = {}
    with Commands() as commands:
        for number, (name, own) in enumerate(runs.items(), start=1):
            if not is_done(as_recorded(configs[name])):
                print(f"=== {number}/{len(runs)} {name}", flush=True)
                command = _command(args.config, [*args.overrides, *own], args.nproc)
                status = commands.run(command)
                if commands.asked and status:
                    print("asked to stop; start the same command again to continue", file=sys.stderr)
                if status:
                    sys.exit(status)
            results[name] = last_metrics(Path(configs[name].output_dir))
    write_atomically(args.out / "results.json", json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
