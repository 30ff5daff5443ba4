"""The course of runs as a picture: loss, accuracy, margin and token weights, in training and evaluation."""

import itertools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.output import fonts
from megatron_tgdpo.output.metrics_file import METRICS_FILE, logged_steps
from megatron_tgdpo.storage.atomic_file import replacing
from megatron_tgdpo.storage.files import write_error

FIGURE_FILE = "metrics.png"
FORMATS = (".png", ".svg", ".pdf")

# Okabe and Ito's colours, which colour-blind people tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
_LINES = ("-", "--", ":", "-.")
_SIZE_INCHES, _DPI = (11.0, 7.0), 110
_LEGEND_CHARACTERS = 130  # that fit side by side
# More training steps than this are drawn as their running mean, with the steps themselves pale behind it.
_SMOOTHED_ABOVE, _WINDOWS = 60, 40

Record = Mapping[str, float]


@dataclass(frozen=True)
class _Panel:
    """A chart: its title, what it draws of training, and what of each validation set, by the end of its name."""

    title: str
    train: str
    evaluation: str
    spread: str | None = None


# The first four of which there is something to draw.
_PANELS = (
    _Panel("loss (nats)", "train/loss", "loss"),
    _Panel("accuracy: pairs with more reward on chosen", "rewards/accuracies", "rewards/accuracies"),
    _Panel("margin: reward of chosen less that of rejected", "rewards/margins", "rewards/margins"),
    _Panel(
        "token weights: mean",
        "guidance/weight_mean",
        "guidance/weight_mean",
        "guidance/weight_std",
    ),
    _Panel("gradient norm before clipping", "train/grad_norm", ""),
    _Panel("log-probs of chosen (nats)", "logps/chosen", "logps/chosen"),
    _Panel("learning rate", "train/lr", ""),
)


def read_records(run: Path) -> list[Record]:
    """:func:`~megatron_tgdpo.output.metrics_file.logged_steps`, of which there must be one.

    Raises:
        UserError: There is no log, or it has no step.
        StorageError: It cannot be read.
    """
    records: list[Record] = list(logged_steps(run))
    if not records:
        raise UserError(f"{run / METRICS_FILE}: no step is in it yet")
    return records


def draw(runs: Mapping[str, Sequence[Record]], out: Path) -> None:
    """Draws runs into one picture, a colour each; of a single run, training and each validation set.

    Args:
        runs: Their records by the names that they are to have.
        out: File to write, of one of :data:`FORMATS`.

    Raises:
        UserError: It cannot be written; a StorageError where that may pass.
    """
    # It would say that it builds a cache of fonts.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    panels = [panel for panel in _PANELS if any(_has(records, panel) for records in runs.values())][:4]
    columns = 1 if len(panels) == 1 else 2
    if not panels:
        raise UserError("no step has any of the metrics that are drawn: name the output directory of a training")
    labels: dict[str, Any] = {}
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(math.ceil(len(panels) / columns), columns, number)
        shaded = ", shaded one standard deviation" if panel.spread and len(runs) == 1 else ""
        axes.set_title(f"{panel.title}{shaded}", loc="left", fontsize=11)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        # Numbers as they are, where matplotlib would write their differences from one in a corner.
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_xlabel("step")
        _draw_panel(axes, panel, runs)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    title = next(iter(runs)) if len(runs) == 1 else f"{len(runs)} runs; thin lines: training, with dots: evaluation"
    figure.suptitle(title, fontsize=13, x=0.01, ha="left", parse_math=False)
    columns = max(1, _LEGEND_CHARACTERS // (6 + max(map(fonts.columns, labels), default=0)))
    legend = figure.legend(
        labels.values(), labels.keys(), loc="outside lower left", ncols=columns, frameon=False, fontsize=10
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    save(figure, out)


def save(figure: Any, out: Path) -> None:
    """Writes a matplotlib figure whole, to a file of one of :data:`FORMATS`.

    Raises:
        UserError: It cannot be written; a StorageError where that may pass.
    """
    fonts.make_legible(figure)
    try:
        with replacing(out) as temporary:
            figure.savefig(temporary, dpi=_DPI, format=out.suffix.lower().lstrip("."))
    except OSError as error:
        raise write_error(out, error) from error


def _has(records: Sequence[Record], panel: _Panel) -> bool:
    return any(panel.train in record for record in records)


def _draw_panel(axes: Any, panel: _Panel, runs: Mapping[str, Sequence[Record]]) -> None:
    colours = itertools.cycle(_COLOURS)
    for run, records in runs.items():
        colour = next(colours)
        alone = len(runs) == 1
        _draw_training(axes, panel, records, colour, None if alone else run)
        groups = _groups(records)
        for number, group in enumerate(groups):
            steps, values = _series(records, f"{group}/{panel.evaluation}")
            if not steps:
                continue
            name = group.replace("eval", "evaluation", 1).replace("/", " ", 1)
            # Of several runs each has one colour, and one word in the legend; of several sets each has a line.
            own, line = (next(colours), "-") if alone else (colour, _LINES[number % len(_LINES)])
            label = name if alone else f"{run}, {name}" if len(groups) > 1 else None
            style = {"color": own, "linestyle": line, "linewidth": 1.8, "marker": "o", "markersize": 4}
            axes.plot(steps, values, label=label, **style)


def _draw_training(axes: Any, panel: _Panel, records: Sequence[Record], colour: str, run: str | None) -> None:
    """Draws the steps; of one run of several, which has a name, their course alone."""
    steps, values = _series(records, panel.train)
    if not steps:
        return
    window = max(1, len(steps) // _WINDOWS) if len(steps) > _SMOOTHED_ABOVE else 1
    if window > 1 and run is None:
        axes.plot(steps, values, color=colour, linewidth=0.5, alpha=0.25)
    smooth = _running_mean(values, window)
    # matplotlib keeps names that begin with _ out of its legends.
    label = run.replace("_", "\N{ZERO WIDTH SPACE}_", 1) if run and run.startswith("_") else run or "training"
    label += f" (mean of {window} steps)" if window > 1 else ""
    axes.plot(steps, smooth, color=colour, linewidth=1.2, alpha=0.75, label=label)
    if panel.spread is not None and run is None:
        spread = dict(zip(*_series(records, panel.spread), strict=True))
        width = _running_mean([spread.get(step, 0.0) for step in steps], window)
        low, high = ([mean + sign * by for mean, by in zip(smooth, width, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)


def _groups(records: Sequence[Record]) -> list[str]:
    """``eval``, or ``eval/NAME`` for each of several validation sets."""
    names = dict.fromkeys(name for record in records for name in record)
    return [name.removesuffix("/loss") for name in names if re.fullmatch("eval(/.+)?/loss", name)]


def _series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, where it was logged."""
    found = [(int(r["step"]), float(r[name])) for r in records if name in r]
    return [step for step, _ in found], [value for _, value in found]


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the ``window - 1`` before it, of fewer at the beginning."""
    counts = np.minimum(np.arange(1, len(values) + 1), window)
    # Not differences of running sums: one huge value would take the digits of all that follow.
    mean: list[float] = (np.convolve(values, np.ones(window))[: len(values)] / counts).tolist()
    return mean
