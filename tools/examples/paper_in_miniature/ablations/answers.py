"""From the runs to numbers with intervals, a file a question, and its figure."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tgdpo.storage.atomic_file import write_atomically
from tools.examples.paper_in_miniature.ablations.arms import (
    ALPHAS,
    BETAS,
    CELLS,
    CHOOSING,
    COMPARING,
    CORRELATIONS,
    DEVIATIONS,
    DPO,
    GRID_ALPHAS,
    GUIDE_BETAS,
    LONG,
    LONG_PLAIN,
    SEEDS,
    SHARES,
    WORDS,
    Arm,
    Credits,
    cell,
    guided,
    long_answers,
    long_arms,
    mislabelled,
)
from tools.examples.paper_in_miniature.ablations.laboratory import Laboratory, final_scores
from tools.examples.paper_in_miniature.statistics import seed_interval, win_rate

_CELL_RATE = 3e-3
Answer = dict[str, Any]


def report(laboratory: Laboratory, questions: Sequence[str], results: Path, images: Path) -> None:
    """Writes ``ablations_QUESTION.json`` and ``ablations_QUESTION.svg`` of the questions, and prints the numbers."""
    from tools.examples.paper_in_miniature.ablations.figures import FIGURES

    for question in questions:
        found = ANSWERS[question](laboratory)
        if not found.get("seeds", True):
            print(f"{question}: no seed is done with all its arms: nothing is written", flush=True)
            continue
        text = json.dumps(found, indent=1)
        results.mkdir(parents=True, exist_ok=True)
        images.mkdir(parents=True, exist_ok=True)
        write_atomically(results / f"ablations_{question}.json", text + "\n")
        FIGURES[question](found, images / f"ablations_{question}.svg")
        print(f"{question}:\n{as_lines(found)}", flush=True)


def compared_cells(laboratory: Laboratory) -> tuple[Arm, Arm]:
    """The best cell with alpha 0 and the best with more, by the mean score on the seeds that choose."""
    scores = {arm: _over(CHOOSING, partial(_cell_score, laboratory, arm=arm))["value"] for arm in CELLS}
    plain, weighted = ([arm for arm in CELLS if (arm.alpha is None) == none] for none in (True, False))
    return max(plain, key=lambda arm: scores[arm]), max(weighted, key=lambda arm: scores[arm])


def _cell_score(laboratory: Laboratory, seed: int, arm: Arm) -> float:
    return statistics.fmean(final_scores(laboratory.result(seed, arm, _CELL_RATE)))


def _over(seeds: Sequence[int], of: Callable[[int], float]) -> Answer:
    values = [of(seed) for seed in seeds]
    interval = {
        name: None if value is None else round(value, 4) for name, value in asdict(seed_interval(values)).items()
    }
    return {**interval, "seeds": [round(value, 4) for value in values]}


def _is_done(laboratory: Laboratory, arm: Arm, seeds: Sequence[int] = SEEDS, rate: float | None = None) -> bool:
    return all(laboratory.is_there(seed, arm, rate) for seed in seeds)


def _beside(laboratory: Laboratory, arm: Arm, other: Arm, seeds: Sequence[int] = SEEDS) -> Answer:
    """An arm's score, and its win rate over another's model at the end."""
    result = laboratory.result
    entry: Answer = {
        "rate": laboratory.rate(arm),
        "score": _over(seeds, lambda s: statistics.fmean(final_scores(result(s, arm)))),
        "diverged": sum(bool(result(s, arm).get("diverged")) for s in seeds),
    }
    if arm != other:
        entry["over_dpo"] = _over(
            seeds, lambda s: win_rate(final_scores(result(s, arm)), final_scores(result(s, other)))
        )
    if arm.guide is not None:
        names = ("correlation", "weight_std", "negative_fraction") + ("alpha",) * (arm.deviation is not None)
        for name in names:
            entry[name] = _over(seeds, partial(_known, laboratory, arm=arm, name=name))
    return entry


def _known(laboratory: Laboratory, seed: int, arm: Arm, name: str) -> float:
    return float(laboratory.result(seed, arm)[name])


def _curves(laboratory: Laboratory) -> Answer:
    """a: oracle score over epochs."""
    arms = {
        arm.name: _curve(laboratory, arm)
        for arm in (*LONG_PLAIN, *long_arms(*ALPHAS))
        if _is_done(laboratory, arm) and _is_done(laboratory, LONG_PLAIN[0])
    }
    return {"sft": _sft(laboratory), "arms": arms}


def _curve(laboratory: Laboratory, arm: Arm) -> Answer:
    def scores(seed: int, epoch: int, of: Arm = arm) -> list[float]:
        found: list[float] = laboratory.result(seed, of)["scores"][str(epoch)]
        return found

    def mean(seed: int, epoch: int) -> float:
        return statistics.fmean(scores(seed, epoch))

    def wins(seed: int, epoch: int) -> float:
        return win_rate(scores(seed, epoch), scores(seed, epoch, dpo))

    dpo = LONG_PLAIN[0]
    entry: Answer = {
        "rate": laboratory.rate(arm),
        "diverged": sum(bool(laboratory.result(seed, arm).get("diverged")) for seed in SEEDS),
        "scores": {epoch: _over(SEEDS, partial(mean, epoch=epoch)) for epoch in LONG.shown},
        "from_2_to_20": _over(SEEDS, lambda seed: mean(seed, 20) - mean(seed, 2)),
    }
    if arm != dpo:
        entry["over_dpo"] = {epoch: _over(SEEDS, partial(wins, epoch=epoch)) for epoch in LONG.shown}
    return entry


def _stopping(laboratory: Laboratory) -> Answer:
    """f: the checkpoint of the best held-out accuracy, and the last."""
    dpo = LONG_PLAIN[0]
    done = [
        arm
        for arm in (*LONG_PLAIN, *long_arms(*ALPHAS))
        if _is_done(laboratory, arm) and all("best_scores" in laboratory.result(s, arm) for s in SEEDS)
    ]
    return {"arms": {arm.name: _stopped(laboratory, arm, dpo if dpo in done else None) for arm in done}}


def _stopped(laboratory: Laboratory, arm: Arm, dpo: Arm | None) -> Answer:
    def best(seed: int, of: Arm = arm) -> float:
        return statistics.fmean(laboratory.result(seed, of)["best_scores"])

    def last(seed: int, of: Arm = arm) -> float:
        return statistics.fmean(final_scores(laboratory.result(seed, of)))

    entry: Answer = {
        "best": _over(SEEDS, best),
        "last": _over(SEEDS, last),
        "best_less_last": _over(SEEDS, lambda seed: best(seed) - last(seed)),
        "best_epoch": _over(SEEDS, lambda seed: laboratory.result(seed, arm)["best_epoch"]),
    }
    if dpo not in (None, arm):
        assert dpo is not None
        entry["less_than_dpos"] = _over(SEEDS, lambda seed: best(seed, dpo) - last(seed, dpo) - best(seed) + last(seed))
    return entry


def _guides(laboratory: Laboratory) -> Answer:
    """b: guides of several qualities, by token and by sentence."""
    guides: list[Arm | Credits] = [*map(Credits, CORRELATIONS), *(Arm("dpo", beta) for beta in GUIDE_BETAS)]
    arms = [guided(guide, alpha, unit) for unit in ("token", "sentence") for guide in guides for alpha in ALPHAS]
    return {
        "sft": _sft(laboratory),
        "arms": {arm.name: _beside(laboratory, arm, DPO) for arm in (DPO, *arms) if _is_done(laboratory, arm)},
    }


def answer_seeds(laboratory: Laboratory) -> list[int]:
    """Those of question c that are done with all lengths and arms, from the first without a gap."""
    laboratories = [laboratory.of_answers(words) for words in WORDS]
    done = [all(one.is_there(seed, arm) for one in laboratories for arm in long_answers()) for seed in SEEDS]
    return list(SEEDS[: [*done, False].index(False)])


def _long_answers(laboratory: Laboratory) -> Answer:
    """c: answers of several lengths, by the deviation of the weights."""
    seeds = answer_seeds(laboratory)
    found: Answer = {"seeds": seeds, "words": {}}
    for words in WORDS if seeds else ():
        one = laboratory.of_answers(words)
        dpo, *weighted = long_answers()
        entry: Answer = {"sft": _sft(one, seeds), "arms": {}}
        entry["arms"]["dpo"] = _beside(one, dpo, dpo, seeds)
        for deviation, arm in zip(DEVIATIONS, weighted, strict=True):
            entry["arms"][f"deviation {deviation:g}"] = _beside(one, arm, dpo, seeds)
        found["words"][str(words)] = entry
    return found


def _noise(laboratory: Laboratory) -> Answer:
    """d: wrong labels."""
    found: Answer = {"arms": {}}
    for share in sorted(SHARES):
        arms = mislabelled(share)
        for arm in arms:
            if _is_done(laboratory, arm) and _is_done(laboratory, arms[0]):
                found["arms"][arm.name] = {"wrong": share, **_beside(laboratory, arm, arms[0])}
    return found


def _grid(laboratory: Laboratory) -> Answer:
    """e: beta by alpha."""
    scores = {}
    for beta in BETAS:
        for alpha in GRID_ALPHAS:
            arm = cell(beta, alpha)
            if _is_done(laboratory, arm, CHOOSING, _CELL_RATE):
                score_of = partial(_cell_score, laboratory, arm=arm)
                scores[f"beta {beta:g}, alpha {alpha:g}"] = _over(CHOOSING, score_of)
    found: Answer = {"scores": scores}
    if len(scores) < len(CELLS):
        return found
    plain, weighted = compared_cells(laboratory)
    found["chosen"] = {"alpha 0": plain.name, "alpha above 0": weighted.name}
    if all(_is_done(laboratory, arm, COMPARING, _CELL_RATE) for arm in (plain, weighted)):
        ours, theirs = (
            {s: final_scores(laboratory.result(s, arm, _CELL_RATE)) for s in COMPARING} for arm in (weighted, plain)
        )
        found["compared"] = _over(COMPARING, lambda s: win_rate(ours[s], theirs[s]))
    return found


def _sft(laboratory: Laboratory, seeds: Sequence[int] = SEEDS) -> Answer:
    return _over(seeds, lambda s: statistics.fmean(laboratory.sft_scores(s)))


ANSWERS: Mapping[str, Callable[[Laboratory], Answer]] = {
    "a": _curves, "b": _guides, "c": _long_answers, "d": _noise, "e": _grid, "f": _stopping,
}  # fmt: skip


def as_lines(found: Any, indent: str = "  ") -> str:
    """For people: a value a line, an interval as one."""
    lines = []
    for name, value in found.items():
        if isinstance(value, Mapping) and "low" in value:
            ends = "" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]"
            lines.append(f"{indent}{name}: {value['value']:.3f}{ends}")
        elif isinstance(value, Mapping):
            lines.append(f"{indent}{name}:\n{as_lines(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{name}: {value}")
    return "\n".join(lines)
