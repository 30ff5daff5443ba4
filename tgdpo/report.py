"""One HTML page that shows what a guide rewards, token by token, on the pairs of a run's config.

    tgdpo report CONFIG.yaml --out report.html [--cache DIR] [section.key=value ...]
    tgdpo report CONFIG.yaml --out report.html [--reference MODEL --guide MODEL] [--policy MODEL]

Log-probs come from a guidance cache (``--cache`` is ``guidance.cache``; a config with ``guidance.mode: cached`` needs
neither), or from models run by transformers (the config's own where none are given). alpha, beta,
tokenizer and data are the config's. How to read the page: docs/insight.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tgdpo.errors import UserError
from tgdpo.command_line import check_present, find_models, run

if TYPE_CHECKING:
    import numpy as np

    from megatron_tgdpo.config.schema import Config
    from megatron_tgdpo.data.dataset import PreferenceDataset, PreferencePair


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="tgdpo report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--out", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--cache", type=Path, help="what tgdpo guidance wrote")
    parser.add_argument("--reference", metavar="MODEL", help="default: the config's reference")
    parser.add_argument("--guide", metavar="MODEL", help="default: model.guide")
    parser.add_argument("--policy", metavar="MODEL", help="one whose log-ratios are added")
    parser.add_argument("--split", default="train", help="train, validation or validation/NAME; default %(default)s")
    parser.add_argument("--pairs", type=int, default=200, help="spread evenly over the data; default %(default)s")
    parser.add_argument("--device", help="of the models; default: a GPU if there is one")
    given = parser.parse_intermixed_args(arguments)
    if given.pairs < 1:
        parser.error("--pairs must be at least 1")
    if given.cache and (given.reference or given.guide):
        parser.error("--cache holds reference and guide already: leave --reference and --guide out")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    given = parse_arguments(arguments)
    return run(lambda: _main(given))


def _main(given: argparse.Namespace) -> None:
    _check_writable(given.out)
    check_present(given, "--cache")
    find_models(given, "--reference", "--guide", "--policy")
    # Only now: these imports take seconds, a wrong option should not.
    from megatron_tgdpo.config.loading import load_config

    cache = [f"guidance.cache={given.cache}"] if given.cache else []
    config = load_config(given.config, [*given.overrides, *cache])
    if "guide" not in config.method.frozen:
        raise UserError(
            f"{given.config}: loss.method {config.loss.method} has no token weights: give a TGDPO run's config, or "
            "set loss.method=tgdpo model.guide=DIR"
        )
    if config.guidance.mode != "cached":
        from megatron_tgdpo.setup.trained_guide import check_finished

        check_finished(config, [given.config, *given.overrides])
    print(_report(given, config))


def _report(given: argparse.Namespace, config: Config) -> str:
    # Here, not above: these imports take seconds, a wrong key of the config should not.
    from megatron_tgdpo.data.tokenizers import load_tokenizer
    from megatron_tgdpo.setup.datasets import preprocess_options
    from megatron_tgdpo.setup.hub_inputs import pin_here
    from megatron_tgdpo.storage.atomic_file import write_atomically
    from tgdpo.reporting.build import chance_warning, report_metrics, report_pairs, summary
    from tgdpo.reporting.render import render_page
    from tgdpo.reporting.sources import check_finite, choose_pairs, open_split

    config = pin_here(config, weights=config.guidance.mode != "cached")
    dataset = open_split(config, given.split)
    pairs = choose_pairs(dataset, given.pairs)
    logps, models = _logps(given, config, dataset, pairs)
    check_finite(logps, pairs)
    metrics = report_metrics(pairs, logps)
    warning = chance_warning(metrics)
    options = preprocess_options(config)
    tokenizer = load_tokenizer(options.tokenizer, options.chat_template, options.template_kwargs)
    shown = report_pairs(dataset, pairs, logps, tokenizer)
    facts = {**models, "data": dataset.prefix, "pairs": f"{len(pairs):,} of {len(dataset):,}"}
    alpha, beta = config.loss.options["alpha"], config.loss.options["beta"]
    page = render_page(shown, metrics, alpha=alpha, beta=beta, facts=facts, warning=warning)
    write_atomically(given.out, page)
    if warning:
        print(f"WARNING: {warning}", file=sys.stderr)
    return f"{summary(metrics, alpha, beta)}\n{given.out}: written, {len(page) / 2**20:.1f} MiB"


def _logps(
    given: argparse.Namespace, config: Config, dataset: PreferenceDataset, pairs: list[PreferencePair]
) -> tuple[dict[str, list[np.ndarray]], dict[str, str]]:
    """Log-probs by model, and what each model's log-probs come from."""
    import torch

    from megatron_tgdpo.setup.model_inputs import compare_with_data
    from megatron_tgdpo.storage.dtypes import DTYPES
    from tgdpo.reporting.sources import cached_logps, model_logps, open_cache

    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[config.precision.dtype]
    policy = {"policy": str(given.policy)} if given.policy else {}
    named = given.reference or given.guide
    if given.cache or (config.guidance.mode == "cached" and not named):
        for tokens in compare_with_data(config, policy):
            tokens.check(dataset)
        directory = str(config.guidance.cache)
        found = cached_logps(open_cache(config, given.split, dataset), directory, pairs)
        return {**found, **model_logps(policy, pairs, dtype, device)}, {"guidance": directory, **policy}
    of_config = config.model_paths
    models = {role: str(getattr(given, role) or of_config[role]) for role in ("reference", "guide")} | policy
    for tokens in compare_with_data(config, models):
        tokens.check(dataset)
    return model_logps(models, pairs, dtype, device), models


def _check_writable(path: Path) -> None:
    """Before hours of work, not after."""
    if path.is_dir():
        raise UserError(f"{path}: is a directory: name a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written: {path.parent} is no directory, or is read-only")


if __name__ == "__main__":
    sys.exit(main())
