"""From a study's files to its metrics: learning rates by the tuning seed, win rates and agreement over the others."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tgdpo.intervals import Estimate
from tgdpo.generation.tables import align, with_interval
from tools.examples.paper_in_miniature.statistics import seed_interval, win_rate
from tools.examples.paper_in_miniature.study import DPO, SIMPO, TUNING_SEED, Arm, Study

_CREDIT_METRICS = ("pearson", "spearman", "auc_bad", "sequence_pearson")


def scores(path: Path) -> list[float]:
    """The oracle's score of each judged answer."""
    return [record["score"] for record in _read(path)]


def best_rate(study: Study, arm: Arm) -> float:
    """The learning rate whose model has the highest mean score on the tuning seed; of equals the lowest."""
    return max(
        sorted(study.scale.rates),
        key=lambda rate: statistics.fmean(scores(study.judged(TUNING_SEED, arm, rate))),
    )


def collect(study: Study, rates: Mapping[str, float]) -> dict[str, Any]:
    """All metrics of a finished study, as plain values.

    Args:
        rates: Learning rate of each arm, by its name.
    """
    seeds = range(1, study.scale.seeds + 1)
    sft = {seed: scores(study.judged(seed)) for seed in seeds}
    judged = {arm.name: {s: scores(study.judged(s, arm, rates[arm.name])) for s in seeds} for arm in study.arms}

    def over_seeds(of: Any) -> dict[str, Any]:
        values = [of(seed) for seed in seeds]
        return {**asdict(seed_interval(values)), "seeds": values}

    metrics: dict[str, Any] = {
        "scale": study.scale.as_json(),
        "sft": {
            "score": over_seeds(lambda s: statistics.fmean(sft[s])),
            "words": over_seeds(lambda s: _mean_words(study.judged(s))),
        },
        "arms": {},
        "tuning": {
            arm.name: {
                f"{rate:g}": statistics.fmean(scores(study.judged(TUNING_SEED, arm, rate)))
                for rate in study.scale.rates
                if study.judged(TUNING_SEED, arm, rate).exists()
            }
            for arm in study.arms
        },
        "credit": {
            guide.name: {
                name: over_seeds(lambda s, g=guide, n=name: _read(study.credit(s, g))[n]) for name in _CREDIT_METRICS
            }
            for guide in (DPO, SIMPO)
        },
    }
    metrics["credit"]["reference"] = {
        name: over_seeds(lambda s, n=name: _read(study.credit(s, DPO))["reference"][n]) for name in _CREDIT_METRICS
    }
    for arm in study.arms:
        own, rate = judged[arm.name], rates[arm.name]
        metrics["arms"][arm.name] = {
            "title": arm.title,
            "guide": arm.guide,
            "alpha": arm.alpha,
            "rate": rate,
            "score": over_seeds(lambda s, own=own: statistics.fmean(own[s])),
            "words": over_seeds(lambda s, arm=arm, rate=rate: _mean_words(study.judged(s, arm, rate))),
            "against": {
                "sft": over_seeds(lambda s, own=own: win_rate(own[s], sft[s])),
                **{
                    other: over_seeds(lambda s, own=own, other=other: win_rate(own[s], judged[other][s]))
                    for other in judged
                    if other != arm.name
                },
            },
        }
    return metrics


def estimate(figure: Mapping[str, Any]) -> Estimate:
    """An interval that was written to JSON."""
    return Estimate(figure["value"], figure["low"], figure["high"])


def text_report(metrics: Mapping[str, Any]) -> str:
    """Two tables: the arms, and the guides."""
    rows = [["arm", "lr", "oracle score", "wins over SFT", "wins over DPO", "wins over SimPO", "words"]]
    sft = metrics["sft"]
    rows.append(
        ["SFT model", "-", _show(sft["score"], "{:.3f}"), "-", "-", "-", f"{sft['words']['value']:.1f}"]
    )  # fmt: skip
    for arm in metrics["arms"].values():
        against = arm["against"]
        wins = [_show(against[other], "{:.1%}") if other in against else "-" for other in ("sft", "dpo", "simpo")]
        rows.append(
            [arm["title"], f"{arm['rate']:g}", _show(arm["score"], "{:.3f}"), *wins, f"{arm['words']['value']:.1f}"]
        )
    credit = [["token rewards of", "Pearson", "Spearman", "AUC of bad tokens", "Pearson of answers"]]
    titles = {"dpo": "DPO guide", "simpo": "SimPO guide", "reference": "(SFT model's log-prob)"}
    for name, title in titles.items():
        credit.append([title, *(_show(metrics["credit"][name][key], "{:.3f}") for key in _CREDIT_METRICS)])
    return f"{align(rows)}\n\n{align(credit)}"


def _show(figure: Mapping[str, Any], form: str) -> str:
    return with_interval(estimate(figure), form)


def _mean_words(path: Path) -> float:
    return statistics.fmean(len(record["answer"].split()) for record in _read(path))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
