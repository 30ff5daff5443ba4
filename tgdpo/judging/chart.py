"""The chart of a judgement: win rates with their intervals, or how often each score was given."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tgdpo.output.figure import save

# Okabe and Ito's colours, as in the other figures.
_WIN, _TIE, _LOSS, _CONTROLLED = "#0072B2", "#BBBBBB", "#D55E00", "#009E73"
_LONGEST_NAME = 40


def draw(results: Mapping[str, Any], judgments: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draws what :func:`~tgdpo.judging.run.summarise` found.

    Raises:
        UserError: It cannot be written; a StorageError where that may pass.
    """
    # It would say that it builds a cache of fonts.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    names = [_short(results[key]) for key in ("model", "against", "judge") if key in results]
    title = f"{' against '.join(names[:-1])}\njudged by {names[-1]}: {results['questions']} questions"
    if results["unparsable"]:
        title += f", {results['unparsable']:.1%} of the verdicts unparsable"
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", parse_math=False)
    (_draw_pairs if "against" in results else _draw_scores)(axes, results, judgments)
    save(figure, out)


def _draw_pairs(axes: Any, results: Mapping[str, Any], _: Sequence[Mapping[str, Any]]) -> None:
    counts = [results[key] for key in ("wins", "ties", "losses")]
    rows, left = ["outcomes"], 0.0
    for count, word, colour in zip(counts, ("won", "tied", "lost"), (_WIN, _TIE, _LOSS), strict=True):
        width = 100 * count / (sum(counts) or 1)
        axes.barh(0, width, left=left, color=colour, height=0.6, label=f"{word}: {count}")
        left += width
    for key, colour in (("win_rate", _WIN), ("length_controlled_win_rate", _CONTROLLED)):
        estimate = results[key]
        if estimate is None:
            continue
        rows.append(key.replace("_", " ").replace("length controlled", "length-controlled"))
        value, low, high = (100 * (estimate["value"] if part is None else part) for part in estimate.values())
        axes.barh(len(rows) - 1, value, color=colour, height=0.6, alpha=0.75)
        # An interval need not hold its own estimate, and matplotlib takes no negative length.
        ends = [[max(value - low, 0)], [max(high - value, 0)]]
        axes.errorbar(value, len(rows) - 1, xerr=ends, color="black", capsize=4, linewidth=1.4)
        axes.text(max(value, high) + 1, len(rows) - 1, f"{value:.1f} %", va="center")
    axes.axvline(50, color="black", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlim(0, 110)
    axes.set_xticks(range(0, 101, 10))
    axes.set_xlabel("per cent of the questions; whiskers: 95 % bootstrap intervals")
    _legend_above(axes)
    if not sum(counts):
        _say_none(axes)


def _draw_scores(axes: Any, results: Mapping[str, Any], judgments: Sequence[Mapping[str, Any]]) -> None:
    # To the nearest whole score; halves go up.
    counts = Counter(int(j["score"] + 0.5) for j in judgments if j["score"] is not None)
    bars = axes.bar(range(1, 11), [counts[score] for score in range(1, 11)], color=_WIN, alpha=0.75)
    axes.bar_label(bars, [str(counts[score] or "") for score in range(1, 11)])
    if results["score"] is not None:
        value, low, high = results["score"].values()
        axes.axvline(value, color=_LOSS, linewidth=1.5, label=f"mean: {value:.2f}")
        if low is not None:
            axes.axvspan(low, high, color=_LOSS, alpha=0.15, label=f"95 % interval: {low:.2f} to {high:.2f}")
        _legend_above(axes)
    else:
        _say_none(axes)
    axes.set_xticks(range(1, 11))
    axes.set_xlabel("score")
    axes.set_ylabel("answers")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.12)


def _legend_above(axes: Any) -> None:
    """A legend that no bar reaches."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, frameon=False)


def _say_none(axes: Any) -> None:
    axes.text(0.5, 0.5, "no verdict to count: see judgments.jsonl", ha="center", transform=axes.transAxes)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"...{name[-_LONGEST_NAME:]}"
