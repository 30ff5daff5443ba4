"""The whole job of ``tgdpo judge``: replies, judgments, results and chart."""

import argparse
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from megatron_tgdpo.console import progress
from megatron_tgdpo.data.manifest import digest_file
from megatron_tgdpo.intervals import Estimate
from tgdpo.generation.journal import SUFFIX, Journal, check_writable, finished_summary, write_whole
from tgdpo.generation.workers import Workers, process_count
from tgdpo.judging.answers import Dialogue, check_same_questions, read_answers
from tgdpo.judging.chart import draw
from tgdpo.judging.judges import Judge, is_url, judge_directory, judge_settings, make_judge
from tgdpo.judging.statistics import bootstrap, first_place_rate, length_controlled, mean, tie_rate
from tgdpo.judging.verdicts import PAIR, SCORE, combine, pair_prompt, parse_score, parse_winner, score_prompt

JUDGMENTS, RESULTS, CHART = "judgments.jsonl", "results.json", "judge.png"

# What is judged: a question, its answer, and the other model's where there is one.
Item = tuple[str, Dialogue, Dialogue | None]


def judge_answers(given: argparse.Namespace) -> dict[str, Any]:
    """Runs the job, or what is left of it, and returns the content of :data:`RESULTS`."""
    # A server is asked by this process, whatever GPUs are here.
    processes = 1 if is_url(given.judge) else process_count(given.nproc)
    name, first = read_answers(given.answers, given.questions)
    baseline, second = read_answers(given.against, given.questions) if given.against else (None, {})
    if given.against:
        check_same_questions(first, second, (given.answers, given.against))
    items = [(key, dialogue, second.get(key)) for key, dialogue in first.items()]
    out, results_file = given.out / JUDGMENTS, given.out / RESULTS
    settings = {
        "answers": digest_file(given.answers).sha256,
        "against": digest_file(given.against).sha256 if given.against else None,
        "questions": digest_file(given.questions).sha256 if given.questions else None,
        "prompt": hashlib.sha256((PAIR if given.against else SCORE).encode()).hexdigest(),
        **judge_settings(given),
    }
    results = finished_summary(out, settings, results_file)
    if results is not None:
        return results
    for file in (out, results_file, given.out / CHART):
        check_writable(file)
    with Journal(out.with_name(out.name + SUFFIX), settings, created=time.time()) as journal:
        if journal.done < len(items):
            with (
                judge_directory(given) as directory,
                Workers(processes, partial(make_judge, given, directory)) as workers,
            ):
                _fill(journal, items, workers, given.batch)
        judgments = list(journal.parts())
        write_whole(out, [json.dumps(judgment, ensure_ascii=False) + "\n" for judgment in judgments])
        results = {
            "settings": settings,
            "judge": given.judge_model or given.judge,
            "model": name,
            **({"against": baseline} if baseline is not None else {}),
            **summarise(judgments),
        }
        draw(results, judgments, given.out / CHART)
        write_whole(results_file, [json.dumps(results, indent=2) + "\n"])
        journal.remove()
    return results


def _fill(journal: Journal, items: Sequence[Item], workers: Workers[Judge], size: int) -> None:
    """Judges what is missing, a line each. Batches begin at multiples of their size, so that a restart has the same."""
    starts = [journal.done, *range((journal.done // size + 1) * size, len(items), size)]
    batches = [items[start:end] for start, end in zip(starts, [*starts[1:], len(items)], strict=True)]
    with progress("judging", len(items), "question", initial=journal.done) as bar:
        for judgments in workers.map(_judge_batch, batches):
            for judgment in judgments:
                journal.append(judgment)
                bar.update()


def _judge_batch(judge: Judge, items: Sequence[Item]) -> list[dict[str, Any]]:
    prompts = []
    for _, dialogue, other in items:
        if other is None:
            prompts.append((dialogue.place, score_prompt(dialogue)))
        else:
            prompts += [(d.place, pair_prompt(d, o)) for d, o in ((dialogue, other), (other, dialogue))]
    replies = judge.reply(prompts)
    judgments: list[dict[str, Any]] = []
    for index, (key, dialogue, other) in enumerate(items):
        if other is None:
            reply = replies[index]
            judgments.append({"question": key, "score": parse_score(reply), "length": dialogue.length, "reply": reply})
            continue
        pair = replies[2 * index : 2 * index + 2]
        one, swapped = map(parse_winner, pair)
        verdicts = [one, None if swapped is None else 1 - swapped]
        judgments.append(
            {
                "question": key,
                "outcome": combine(verdicts),
                "verdicts": verdicts,
                "lengths": [dialogue.length, other.length],
                "replies": pair,
            }
        )
    return judgments


def summarise(judgments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of docs/evaluation.md; those without an observation are None."""
    if "score" in judgments[0]:
        scores = np.array([j["score"] for j in judgments if j["score"] is not None], float)
        return {
            "questions": len(judgments),
            "score": _estimate(bootstrap(mean, scores)) if len(scores) else None,
            "unparsable": 1 - len(scores) / len(judgments),
            "mean_length": mean(np.array([j["length"] for j in judgments])),
        }
    read = [judgment for judgment in judgments if judgment["outcome"] is not None]
    outcomes = np.array([judgment["outcome"] for judgment in read], float)
    differences = np.array([judgment["lengths"][0] - judgment["lengths"][1] for judgment in read], float)
    lengths = np.array([judgment["lengths"] for judgment in judgments], float)
    verdicts = [verdict for judgment in judgments for verdict in judgment["verdicts"]]
    dependent = [j["verdicts"][0] != j["verdicts"][1] for j in read]
    return {
        "questions": len(judgments),
        "win_rate": _estimate(bootstrap(mean, outcomes)) if read else None,
        "length_controlled_win_rate": _estimate(bootstrap(length_controlled, outcomes, differences)) if read else None,
        "tie_rate": _estimate(bootstrap(tie_rate, outcomes)) if read else None,
        "wins": int(np.sum(outcomes == 1)),
        "ties": int(np.sum(outcomes == 0.5)),
        "losses": int(np.sum(outcomes == 0)),
        "order_dependent": sum(dependent) / len(read) if read else None,
        "first_place_rate": first_place_rate([judgment["verdicts"] for judgment in judgments]),
        "unparsable": verdicts.count(None) / len(verdicts),
        "left_out": len(judgments) - len(read),
        "mean_length": mean(lengths[:, 0]),
        "mean_length_against": mean(lengths[:, 1]),
    }


def _estimate(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else asdict(estimate)
