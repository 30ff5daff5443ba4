"""One HTML page that shows what a guide rewards, token by token, on the pairs of a run's config.

    tgdpo report CONFIG.yaml --out report.html [--cache DIR] [section.key=value ...]
    tgdpo report CONFIG.yaml --out report.html [--reference MODEL --guide MODEL] [--policy MODEL]
    tgdpo report CONFIG.yaml --out report.html --guide MODEL --guide MODEL

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
    parser.add_argument(
        "--guide", metavar="MODEL", action="append", help="default: model.guide; several are shown side by side"
    )
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
    asked = argparse.Namespace(**vars(given))
    find_models(given, "--reference", "--guide", "--policy")
    # Only now: these imports take seconds, a wrong option should not.
    from megatron_tgdpo.config.loading import load_config

    cache = [f"guidance.cache={given.cache}"] if given.cache else []
    config = load_config(given.config, [*given.overrides, *cache])
    if "guide" not in config.method.frozen:
        raise UserError(
            f"{given.config}: loss.method {config.loss.method} has no token weights of a guide: give a TGDPO run's "
            "config, or set loss.method=tgdpo model.guide=DIR"
        )
    if config.guidance.mode != "cached":
        from megatron_tgdpo.setup.trained_guide import check_finished

        check_finished(config, [given.config, *given.overrides])
    print(_report(given, asked, config))


def _report(given: argparse.Namespace, asked: argparse.Namespace, config: Config) -> str:
    # Here, not above: these imports take seconds, a wrong key of the config should not.
    from megatron_tgdpo.data.tokenizers import load_tokenizer
    from megatron_tgdpo.setup.datasets import preprocess_options
    from megatron_tgdpo.setup.hub_inputs import pin_here
    from megatron_tgdpo.storage.atomic_file import write_atomically
    from tgdpo.reporting.build import remarks, report_metrics, report_pairs, selected_tokens, summary
    from tgdpo.reporting.render import render_page
    from tgdpo.reporting.sources import check_finite, choose_pairs, open_split

    pinned = pin_here(config, weights=config.guidance.mode != "cached")
    models, names = _models(given, pinned), _models(asked, config)
    guides = [role for role in models if role.startswith("guide")]
    dataset = open_split(pinned, given.split)
    pairs = choose_pairs(dataset, given.pairs)
    places = [dataset.source(pair.index) for pair in pairs]
    logps, cache = _logps(given, pinned, models, dataset, pairs, places)
    check_finite(logps, places)
    metrics = report_metrics(pairs, logps, guides)
    warnings, notes = remarks(metrics)
    options = preprocess_options(pinned)
    tokenizer = load_tokenizer(options.tokenizer, options.chat_template, options.template_kwargs)
    shown = report_pairs(dataset, pairs, logps, tokenizer)
    facts = {
        **{role: _name(names[role], models[role]) for role in models},
        **({"log-probs": f"guidance cache {cache}, of the config's models"} if cache else {}),
        "data": ", ".join(source.path for source in config.datasets[given.split]),
        "pairs": f"{len(pairs):,} of {len(dataset):,}",
    }
    loss = config.loss.options
    weights = selected_tokens(pairs, logps, guides, loss)
    strength = {
        "alpha": loss.get("alpha", 0.0),
        "beta": loss["beta"],
        "guide_beta": loss["guide_beta"],
        "weights": weights,
    }
    plain = {"form": "sigmoid", "reference_free": False, "label_smoothing": 0.0, "sft_weight": 0.0, "gamma": 0.0}
    plain_loss = all(loss[name] == value for name, value in plain.items())
    page = render_page(shown, metrics, **strength, facts=facts, plain_loss=plain_loss, warnings=warnings, notes=notes)
    write_atomically(given.out, page)
    for prefix, texts in (("WARNING", warnings), ("note", notes)):
        for text in texts:
            print(f"{prefix}: {text}", file=sys.stderr)
    return f"{summary(metrics, facts, **strength)}\n{given.out}: written, {len(page) / 2**20:.1f} MiB"


def _models(given: argparse.Namespace, config: Config) -> dict[str, str]:
    """Models by what they are here: reference, guide (of several ``guide 1``, ``guide 2`` and so on), policy."""
    of_config = config.model_paths
    guides = given.guide or [of_config["guide"]]
    names = ["guide"] if len(guides) == 1 else [f"guide {k}" for k in range(1, len(guides) + 1)]
    policy = {"policy": str(given.policy)} if given.policy else {}
    return {
        "reference": str(given.reference or of_config["reference"]),
        **{name: str(guide) for name, guide in zip(names, guides, strict=True)},
        **policy,
    }


def _name(asked: str, found: str) -> str:
    """A model for people: as it was asked for, or where it was found within that, such as a run's checkpoint."""
    return found if Path(found).absolute().is_relative_to(Path(asked).absolute()) else asked


def _logps(
    given: argparse.Namespace,
    config: Config,
    models: dict[str, str],
    dataset: PreferenceDataset,
    pairs: list[PreferencePair],
    places: list[str],
) -> tuple[dict[str, list[np.ndarray]], str | None]:
    """Log-probs by model, and the cache that those of reference and guide are from, if they are."""
    import torch

    from megatron_tgdpo.setup.model_inputs import compare_with_data
    from megatron_tgdpo.storage.dtypes import DTYPES
    from tgdpo.reporting.sources import cached_logps, model_logps, open_cache

    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[config.precision.dtype]
    named = given.reference or given.guide
    cache = str(config.guidance.cache) if given.cache or (config.guidance.mode == "cached" and not named) else None
    running = {role: model for role, model in models.items() if cache is None or role == "policy"}
    for tokens in compare_with_data(config, running):
        tokens.check(dataset)
    found = {}
    if cache is not None:
        found = cached_logps(open_cache(config, given.split, dataset), cache, pairs, places)
    # Adapters of the config are of its policy.
    policy = Path(config.model_paths["policy"])
    bases = {role: policy for role, asked in (("reference", given.reference), ("guide", given.guide)) if not asked}
    return {**found, **model_logps(running, pairs, dtype, device, bases)}, cache


def _check_writable(path: Path) -> None:
    """Before hours of work, not after."""
    if path.is_dir():
        raise UserError(f"{path}: is a directory: name a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written: {path.parent} is no directory, or is read-only")


if __name__ == "__main__":
    sys.exit(main())
