"""From the evaluations of the splits to numbers with intervals, a table and a figure."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from megatron_tgdpo.intervals import Estimate
from megatron_tgdpo.output.metrics_file import logged_steps
from tgdpo.generation.tables import align, with_interval
from tools.examples.paper_in_miniature.statistics import seed_interval
from tools.examples.real_pairs.study import GUIDES, QUESTIONS, Study

matplotlib.use("Agg")
# The same figure from the same numbers, byte for byte.
matplotlib.rcParams["svg.hashsalt"] = "real_pairs"
TITLES = {
    "dpo": "DPO",
    "simpo": "SimPO",
    "tgdpo_dpo": "TGDPO, DPO guide",
    "tgdpo_simpo": "TGDPO, SimPO guide",
}
# Okabe and Ito's.
_COLOURS = {"dpo": "#0072B2", "simpo": "#D55E00", "tgdpo_dpo": "#009E73", "tgdpo_simpo": "#CC79A7"}
_METRICS = ("accuracy", "accuracy_per_token", "margin")
_WEIGHTS = ("weight_std", "weight_mean", "negative_fraction")


def finished_splits(study: Study) -> list[int]:
    """Splits of which all arms are evaluated."""
    found = (int(path.name[5:]) for path in study.root.glob("split*") if path.name[5:].isdecimal())
    return [n for n in sorted(found) if all(study.evaluation(n, guide).exists() for guide in GUIDES)]


def collect(study: Study, splits: Sequence[int]) -> dict[str, Any]:
    """Means over splits with Student's 95 % intervals, and every split's own numbers.

    Args:
        splits: Of :func:`finished_splits`, at least one.
    """
    evaluations = {(n, guide): _read(study.evaluation(n, guide)) for n in splits for guide in GUIDES}
    first = evaluations[splits[0], GUIDES[0]]

    def of(guide: str, role: str, name: str) -> list[float]:
        """A metric of a model by split."""
        return [float(evaluations[n, guide]["models"][role][name]["value"]) for n in splits]

    found: dict[str, Any] = {
        "splits": list(splits),
        "pairs": {"train": study.settings.train, "held_out": study.settings.held_out},
        "overrides": [text for text in study.settings.overrides if "/" not in text],
        "evaluation": {name: first[name] for name in ("beta", "max_length", "max_prompt_length", "dtype")},
        "reference": {name: _over(of(GUIDES[0], "reference", name)) for name in ("accuracy", "accuracy_per_token")},
        "arms": {},
    }
    for arm, title in TITLES.items():
        guide = arm.removeprefix("tgdpo_")
        role = "guide" if arm == guide else "tgdpo"
        entry: dict[str, Any] = {"title": title}
        for name in _METRICS:
            values, dpos = of(guide, role, name), of("dpo", "guide", name)
            entry[name] = _over(values)
            if arm != "dpo":
                entry[f"{name}_less_dpos"] = _over([own - other for own, other in zip(values, dpos, strict=True)])
        if arm != guide:
            weights = [_weights(study.run(n, guide)) for n in splits]
            for name in _WEIGHTS:
                entry[name] = _over([of_split[name] for of_split in weights])
        found["arms"][arm] = entry
    return found


def _weights(run: Path) -> dict[str, float]:
    """Means over a run's steps."""
    steps = list(logged_steps(run))
    return {name: statistics.fmean(step[f"guidance/{name}"] for step in steps) for name in _WEIGHTS}


def _over(values: Sequence[float]) -> dict[str, Any]:
    """Of one value a split."""
    return {**asdict(seed_interval(values)), "splits": list(values)}


def text_report(found: Mapping[str, Any]) -> str:
    """Two tables: the arms, and TGDPO's weights."""

    def show(figure: Mapping[str, Any] | None, form: str) -> str:
        return "-" if figure is None else with_interval(Estimate(*(figure[k] for k in ("value", "low", "high"))), form)

    rows = [["arm", "accuracy", "less DPO's", "per token", "margin (nats)", "less DPO's"]]
    reference = found["reference"]
    rows.append(["(reference)", show(reference["accuracy"], "{:.1%}"), "-",
                 show(reference["accuracy_per_token"], "{:.1%}"), "-", "-"])  # fmt: skip
    weights = [["token weights", "deviation", "mean", "negative"]]
    for arm in found["arms"].values():
        rows.append(
            [
                arm["title"],
                show(arm["accuracy"], "{:.1%}"),
                show(arm.get("accuracy_less_dpos"), "{:+.1%}"),
                show(arm["accuracy_per_token"], "{:.1%}"),
                show(arm["margin"], "{:+.4f}"),
                show(arm.get("margin_less_dpos"), "{:+.4f}"),
            ]
        )
        if "weight_std" in arm:
            forms = {"weight_std": "{:.5f}", "weight_mean": "{:.5f}", "negative_fraction": "{:.2%}"}
            weights.append([arm["title"], *(show(arm[name], form) for name, form in forms.items())])
    pairs, count = found["pairs"], len(found["splits"])
    head = f"{count} split{'s' * (count > 1)} of {pairs['train']} pairs to train and {pairs['held_out']} held out; "
    return f"{head}in brackets Student's 95% intervals over splits\n{align(rows)}\n\n{align(weights)}"


def sample_report(study: Study) -> str:
    """Questions of :data:`QUESTIONS` with the answers of the models of the first split that have any."""
    blocks = []
    answers = {name: _read(study.answers(name)) for name in ("before", *TITLES) if study.answers(name).exists()}
    for at, question in enumerate(_read(QUESTIONS)):
        lines = [question["instruction"]]
        lines += [f"  {name}: {' '.join(of[at]['output'].split())}" for name, of in answers.items()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def draw(found: Mapping[str, Any], out: Path) -> None:
    """Held-out accuracy and margin by arm: a point a split, the mean with its interval."""
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    for axes, (name, label, scale) in zip(
        figure.subplots(1, 2),
        (("accuracy", "held-out accuracy (%)", 100.0), ("margin", "held-out margin (nats)", 1.0)),
        strict=True,
    ):
        for at, (arm, entry) in enumerate(found["arms"].items()):
            values = entry[name]
            axes.plot([at] * len(values["splits"]), [scale * value for value in values["splits"]], "o",
                      color=_COLOURS[arm], alpha=0.35, markersize=4)  # fmt: skip
            low, high = (values["value"] if values[end] is None else values[end] for end in ("low", "high"))
            errors = [[scale * (values["value"] - low)], [scale * (high - values["value"])]]
            axes.errorbar([at], [scale * values["value"]], errors, fmt="D", capsize=4, color=_COLOURS[arm])
        axes.axhline(50.0 if name == "accuracy" else 0.0, color="#999999", linewidth=0.8, linestyle="--")
        axes.set_xticks(range(len(TITLES)), [title.replace(", ", ",\n") for title in TITLES.values()], fontsize="small")
        axes.set_xlim(-0.5, len(TITLES) - 0.5)
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Without a date the file depends on the numbers alone.
    figure.savefig(out, metadata={"Date": None})


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
