"""A study's metrics as pictures. Colours are those of Okabe and Ito, which colour-blind people tell apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("Agg")
_COLOURS = {"dpo": "#0072B2", "simpo": "#D55E00"}
_TITLES = {"dpo": "DPO", "simpo": "SimPO"}


def plot_win_rates(metrics: Mapping[str, Any], out: Path) -> None:
    """Win rate over the SFT model against alpha, one line a guide, and the unguided methods as bands."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for method, style in (("dpo", "--"), ("simpo", ":")):
        rate = metrics["arms"][method]["against"]["sft"]
        axes.axhline(rate["value"], linestyle=style, color=_COLOURS[method], label=f"{_TITLES[method]} alone")
        if rate["low"] is not None:
            axes.axhspan(rate["low"], rate["high"], color=_COLOURS[method], alpha=0.08)
    for guide, marker in (("dpo", "o"), ("simpo", "s")):
        points = guided_points(metrics, guide)
        values = [rate["value"] for _, rate in points]
        errors = _errors([rate for _, rate in points])
        alphas = [alpha + (0.02 if guide == "simpo" else 0.0) for alpha, _ in points]
        label = f"TGDPO, {_TITLES[guide]} guide"
        axes.errorbar(alphas, values, errors, marker=marker, capsize=3, color=_COLOURS[guide], label=label)
    axes.set_xlabel("alpha")
    axes.set_ylabel("win rate over the SFT model, by the oracle")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(out)


def plot_credit(metrics: Mapping[str, Any], out: Path) -> None:
    """How each guide's token rewards agree with the oracle's credits."""
    names = {"pearson": "Pearson", "spearman": "Spearman", "auc_bad": "AUC of bad tokens"}
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    colours = {**_COLOURS, "reference": "#999999"}
    labels = {"dpo": "DPO guide", "simpo": "SimPO guide", "reference": "SFT model's log-prob"}
    for position, (source, colour) in enumerate(colours.items()):
        credit = [metrics["credit"][source][name] for name in names]
        values = [entry["value"] for entry in credit]
        places = [index + 0.27 * (position - 1) for index in range(len(names))]
        axes.bar(places, values, width=0.25, color=colour, label=labels[source])
        axes.errorbar(places, values, _errors(credit), fmt="none", ecolor="black", capsize=3)
    axes.set_xticks(range(len(names)), list(names.values()))
    axes.legend(fontsize="small")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(out)


def guided_points(metrics: Mapping[str, Any], guide: str) -> Sequence[tuple[float, Mapping[str, Any]]]:
    """(alpha, win rate over the SFT model) of a guide's arms by alpha; alpha 0, DPO whatever the guide, is in both."""
    arms = [arm for arm in metrics["arms"].values() if arm["alpha"] is not None]
    return sorted(
        ((arm["alpha"], arm["against"]["sft"]) for arm in arms if arm["guide"] == guide or arm["alpha"] == 0),
        key=lambda point: point[0],
    )


def _errors(found: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Lengths of error bars, down and up; none where there is no interval."""
    lows = [0.0 if figure["low"] is None else figure["value"] - figure["low"] for figure in found]
    highs = [0.0 if figure["high"] is None else figure["high"] - figure["value"] for figure in found]
    return [lows, highs]
