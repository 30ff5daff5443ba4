"""A figure a question. Colours are those of Okabe and Ito, which colour-blind people tell apart."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.examples.paper_in_miniature.ablations.arms import (
    ALPHAS,
    BETAS,
    CORRELATIONS,
    DEVIATIONS,
    GRID_ALPHAS,
    GUIDE_BETAS,
    LONG_PLAIN,
    SHARES,
    Arm,
    Credits,
    guided,
    long_arms,
    mislabelled,
)

matplotlib.use("Agg")
# The same figure from the same numbers, byte for byte.
matplotlib.rcParams["svg.hashsalt"] = "ablations"
BLUE, ORANGE, GREEN, PINK, BROWN, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D31", "#56B4E9"
Found = Mapping[str, Any]


def _long_titles() -> dict[str, tuple[str, str, str]]:
    """Of the arms of a and f: title, colour, line."""
    titles = {LONG_PLAIN[0].name: ("DPO", BLUE, "-"), LONG_PLAIN[1].name: ("SimPO", ORANGE, "-")}
    for alpha, style in zip(ALPHAS, ("--", ":"), strict=True):
        for arm, guide, colour in zip(long_arms(alpha), ("DPO", "SimPO"), (GREEN, PINK), strict=True):
            titles[arm.name] = (f"TGDPO, {guide} guide, alpha {alpha:g}", colour, style)
    return titles


def curves(found: Found, out: Path) -> None:
    """a: oracle score over epochs."""
    figure, axes = _axes()
    for name, (title, colour, style) in _long_titles().items():
        if name in found["arms"]:
            scores = found["arms"][name]["scores"]
            epochs = [int(epoch) for epoch in scores]
            _line(axes, epochs, list(scores.values()), label=title, color=colour, linestyle=style)
    _band(axes, found["sft"], "SFT model")
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set(xlabel="epochs (300 pairs)", ylabel="oracle score")
    _finish(figure, axes, out)


def guides(found: Found, out: Path) -> None:
    """b: win rate over DPO against the guide's correlation with the oracle's credits."""
    figure, axes = _axes()
    kinds: list[tuple[str, str, list[Arm | Credits]]] = [
        ("oracle's credits with noise", "o", [Credits(c) for c in CORRELATIONS]),
        ("DPO model", "D", [Arm("dpo", beta) for beta in GUIDE_BETAS]),
    ]
    colours = {("token", 0.2): BLUE, ("token", 0.5): ORANGE, ("sentence", 0.2): SKY, ("sentence", 0.5): PINK}
    for kind, marker, guides_ in kinds:
        for (unit, alpha), colour in colours.items():
            arms = [guided(guide, alpha, unit).name for guide in guides_]
            shown = sorted(
                (found["arms"][name] for name in arms if name in found["arms"]), key=lambda a: a["correlation"]["value"]
            )
            places = [arm["correlation"]["value"] for arm in shown]
            label = f"{kind}, alpha {alpha:g}" + (", by sentence" if unit == "sentence" else "")
            line = "-" if marker == "o" else "none"
            _line(axes, places, [arm["over_dpo"] for arm in shown], label, marker=marker, color=colour, linestyle=line)
    axes.axhline(0.5, color="#999999", linewidth=1)
    axes.set(xlabel="correlation of token rewards with the oracle's credits", ylabel="win rate over DPO")
    _finish(figure, axes, out)


def answers(found: Found, out: Path) -> None:
    """c: win rate over DPO against the deviation of the weights, a line a length."""
    figure, axes = _axes()
    for number, ((words, entry), colour) in enumerate(zip(found["words"].items(), (BLUE, GREEN, ORANGE), strict=False)):
        shown = [entry["arms"][f"deviation {deviation:g}"]["over_dpo"] for deviation in DEVIATIONS]
        # Beside each other, on an axis of logarithms.
        _line(axes, [deviation * 1.04**number for deviation in DEVIATIONS], shown, f"{words} words", color=colour)
    axes.axhline(0.5, color="#999999", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(DEVIATIONS, [f"{deviation:g}" for deviation in DEVIATIONS])
    axes.minorticks_off()
    axes.set(xlabel="standard deviation of the weights", ylabel="win rate over DPO")
    _finish(figure, axes, out)


def noise(found: Found, out: Path) -> None:
    """d: oracle score against the share of wrong labels."""
    figure, axes = _axes()
    for place, (title, colour) in enumerate((("DPO", BLUE), ("TGDPO, alpha 0.2", GREEN), ("robust DPO", ORANGE))):
        shown = []
        for share in sorted(SHARES):
            arms = mislabelled(share)
            name = arms[place].name if place < len(arms) else arms[0].name
            if name in found["arms"]:
                shown.append((share + 0.004 * (place - 1), found["arms"][name]["score"]))
        _line(axes, [x for x, _ in shown], [y for _, y in shown], title, color=colour)
    axes.set(xlabel="share of wrong labels", ylabel="oracle score")
    _finish(figure, axes, out)


def grid(found: Found, out: Path) -> None:
    """e: oracle score against alpha, a line a beta."""
    figure, axes = _axes()
    for number, (beta, colour) in enumerate(zip(BETAS, (SKY, BLUE, GREEN, ORANGE), strict=True)):
        shown = [
            (alpha + 0.01 * number, found["scores"][key])
            for alpha in GRID_ALPHAS
            if (key := f"beta {beta:g}, alpha {alpha:g}") in found["scores"]
        ]
        # Two seeds have no interval worth a bar.
        axes.plot([x for x, _ in shown], [y["value"] for _, y in shown], "o-", color=colour, label=f"beta {beta:g}")
    axes.set(xlabel="alpha", ylabel="oracle score, mean of the choosing seeds")
    _finish(figure, axes, out)


def stopping(found: Found, out: Path) -> None:
    """f: the checkpoint of the best held-out accuracy beside the last."""
    figure, axes = _axes()
    shown = [(title, found["arms"][name]) for name, (title, _, _) in _long_titles().items() if name in found["arms"]]
    for offset, key, colour, label in ((-0.1, "best", BLUE, "best held-out accuracy"), (0.1, "last", ORANGE, "last")):
        places = [number + offset for number in range(len(shown))]
        _line(axes, places, [arm[key] for _, arm in shown], label, color=colour, linestyle="none")
    titles = [title.replace(", alpha", ",\nalpha").replace(", DPO", ",\nDPO").replace(", SimPO", ",\nSimPO")
              for title, _ in shown]  # fmt: skip
    axes.set_xticks(range(len(shown)), titles, fontsize="small")
    axes.set(ylabel="oracle score")
    _finish(figure, axes, out)


FIGURES: Mapping[str, Callable[[Found, Path], None]] = {
    "a": curves, "b": guides, "c": answers, "d": noise, "e": grid, "f": stopping,
}  # fmt: skip


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    return figure, figure.subplots()


def _line(axes: Axes, places: list[Any], found: list[Any], label: str, **style: Any) -> None:
    """Values with the ends of their intervals."""
    if not found:
        return
    values = [entry["value"] for entry in found]
    lows = [0.0 if entry["low"] is None else entry["value"] - entry["low"] for entry in found]
    highs = [0.0 if entry["high"] is None else entry["high"] - entry["value"] for entry in found]
    axes.errorbar(places, values, [lows, highs], capsize=3, label=label, **{"marker": "o", "markersize": 4, **style})


def _band(axes: Axes, entry: Found, label: str) -> None:
    axes.axhline(entry["value"], color="#999999", linewidth=1, label=label)


def _finish(figure: Figure, axes: Axes, out: Path) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small")
    axes.grid(alpha=0.3)
    figure.savefig(out, metadata={"Date": None})
