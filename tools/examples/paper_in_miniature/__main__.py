"""The paper's comparison in miniature: SFT, DPO, SimPO and TGDPO with either as its guide, on a generated language.

    python -m tools.examples.paper_in_miniature --out DIR [--workers 2] [--seeds 5] [--beta 0.3]
        [--alphas 0.2 0.5 1 2] [--short]

A seed: answers of mixed quality train an SFT model; n of its answers to each prompt, the best and the worst by the
oracle, make the pairs; every arm trains on them from the SFT model with the same budget; the oracle judges answers to
held-out prompts. Seed 0 chooses each arm's learning rate from one grid, the others are reported. Start the same command
again to continue after an interruption. It writes ``results.json``, ``results.txt``, ``win_rates.svg`` and
``credit.svg``. docs/reproduction.md has the protocol and what came out. Needs the extra ``reproduction``.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.atomic_file import write_atomically
from tgdpo.command_line import positive, run
from tools.examples.paper_in_miniature.jobs import run_jobs
from tools.examples.paper_in_miniature.results import best_rate, collect, text_report
from tools.examples.paper_in_miniature.study import DPO, SHORT, SIMPO, TUNING_SEED, Arm, Scale, Study


def open_study(out: Path, scale: Scale) -> Study:
    """A study in a new directory, or the one that is there.

    Raises:
        UserError: Another one is there, or something else.
    """
    file = out / "study.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if any(out.iterdir()):
                raise UserError(f"{out}: not empty, and holds no study: name another directory")
            write_atomically(file, json.dumps(scale.as_json(), indent=2) + "\n")
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{out}: cannot write there: {error.strerror}") from error
    for name, value in scale.as_json().items():
        if found.get(name) != value:
            raise UserError(f"{file}: this study has {name} {found.get(name)}, not {value}: name another directory")
    return Study(out.resolve(), scale)


def conduct(study: Study, workers: int) -> None:
    """Runs all that is not done yet and writes the results."""
    seeds = range(1, study.scale.seeds + 1)
    run_jobs("SFT models and pairs", [study.preparation(seed) for seed in (TUNING_SEED, *seeds)], workers)
    rates = _tune(study, workers)
    for title, arms in (("DPO and SimPO", [DPO, SIMPO]), ("TGDPO", study.guided)):
        jobs = [study.training(seed, arm, rates[arm.name], _guide_rate(arm, rates)) for seed in seeds for arm in arms]
        run_jobs(f"{title}, reported seeds", jobs, workers)
    jobs = [study.crediting(seed, guide, rates[guide.name]) for seed in seeds for guide in (DPO, SIMPO)]
    run_jobs("token rewards", jobs, workers)
    metrics = collect(study, rates)
    write_atomically(study.root / "results.json", json.dumps(metrics, indent=1) + "\n")
    report = text_report(metrics)
    write_atomically(study.root / "results.txt", report + "\n")
    print(f"\n{report}")
    _draw(study, metrics)


def _tune(study: Study, workers: int) -> dict[str, float]:
    """Each arm's best learning rate on the tuning seed; guides first, since TGDPO needs the best of them."""
    rates: dict[str, float] = {}
    for title, arms in (("DPO and SimPO", [DPO, SIMPO]), ("TGDPO", study.guided)):
        jobs = [
            study.training(TUNING_SEED, arm, rate, _guide_rate(arm, rates))
            for arm in arms
            for rate in _candidates(study, arm, rates)
        ]
        run_jobs(f"{title}, learning rates", jobs, workers)
        rates |= {arm.name: rates[DPO.name] if arm.alpha == 0 else best_rate(study, arm) for arm in arms}
    return rates


def _candidates(study: Study, arm: Arm, rates: dict[str, float]) -> tuple[float, ...]:
    # At alpha 0 TGDPO is DPO: there is nothing to choose.
    return (rates[DPO.name],) if arm.alpha == 0 else study.scale.rates


def _guide_rate(arm: Arm, rates: dict[str, float]) -> float | None:
    return None if arm.guide is None else rates[arm.guide]


def _draw(study: Study, metrics: dict[str, Any]) -> None:
    from tools.examples.paper_in_miniature.plots import plot_credit, plot_win_rates

    for name, plot in (("win_rates.svg", plot_win_rates), ("credit.svg", plot_credit)):
        plot(metrics, study.root / name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.examples.paper_in_miniature",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory, or one to continue")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="trainings at a time (default: cores)")
    parser.add_argument("--seeds", type=positive, help=f"reported ones (default: {Scale.seeds})")
    parser.add_argument("--beta", type=float, help=f"of DPO and TGDPO (default: {Scale.beta})")
    parser.add_argument("--alphas", type=float, nargs="+", help="of TGDPO, besides 0 (default: 0.2 0.5 1 2)")
    parser.add_argument("--short", action="store_true", help="everything once at toy size, to see that it works")
    args = parser.parse_args(arguments)
    scale = SHORT if args.short else Scale()
    chosen = {name: value for name in ("seeds", "beta", "alphas") if (value := getattr(args, name)) is not None}
    if "alphas" in chosen:
        chosen["alphas"] = tuple(sorted(set(chosen["alphas"]) - {0.0}))
    return run(lambda: conduct(open_study(args.out, replace(scale, **chosen)), args.workers))


if __name__ == "__main__":
    raise SystemExit(main())
